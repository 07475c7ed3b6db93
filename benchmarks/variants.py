"""Every kernel that the ops can launch, for an architecture that need not be here: ahead of time, from real calls.

For each op this file calls forward and backward of `route_kernels.triton` on tensors of the meta device; the launches
that come of it, as they would be specialized on that architecture, are the op's variants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from route_kernels.ops.sigmoid_focal_loss import kept_scale
from route_kernels.precision import accumulate_dtype
from route_kernels.triton import (
    add_layer_norm,
    launch,
    ms_deform_attn_fused,
    query_similarity,
    routed_attention,
    sigmoid_focal_loss,
)
from route_kernels.triton.availability import DTYPES
from route_kernels.triton.block_sizes import HALF
from route_kernels.triton.ms_deform_attn.host import Points, _backward, sample

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RANKS = ((16, 3), (32, 8), (64, 32))  # R and G of routed attention
LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
"""The levels of a detector's image of 800 x 1333 pixels."""


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one launch."""

    op: str
    direction: str  # "forward" or "backward"
    name: str  # kernel, dtype, what is peculiar: unique within op and architecture
    architecture: str
    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]  # by parameter: "*bf16", "i32", "constexpr"
    constexprs: dict[tuple[int, ...], Any]  # by place of the parameter
    attributes: dict[tuple[int, ...], Any]  # divisibility by 16, likewise
    options: dict[str, Any]  # num_warps, num_stages, ...
    entries: frozenset[tuple[str, int]]  # (kernel name, place) of the table's entries that the settings are
    spilled_bytes: int = 0  # of a lane, at most: known, and no block size was found without

    def compile(self) -> CompiledKernel:
        """The machine code, from Triton's cache where it has it."""
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        return compile_source(source, target=TARGETS[self.architecture], options=self.options)


def recorded(op: str, direction: str, label: str, architecture: str, call: Callable[[], Any]) -> list[Variant]:
    """The variants that `call`, on tensors of the meta device, would launch on this architecture."""
    with launch.recording(architecture) as record:
        call()
    return [_variant(op, direction, label, architecture, item) for item in record.launches]


def of_op(op: str, architecture: str) -> Iterator[Variant]:
    """Every variant of one op, each once: launches that specialize alike are one."""
    seen = set()
    for variant in VARIANTS[op](architecture):
        if variant.op != op:
            continue
        alike = repr((variant.kernel, variant.signature, variant.constexprs, variant.attributes, variant.options))
        if alike not in seen:
            seen.add(alike)
            yield variant


def _variant(op: str, direction: str, label: str, architecture: str, item: launch.Launch) -> Variant:
    kernel, backend = item.kernel, make_backend(TARGETS[architecture])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    settings = {**item.settings, "debug": False}
    bound, specialization, options = bind(*item.arguments, **settings)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, settings, bound, specialization, options)
    return Variant(
        op, direction, f"{kernel.fn.__name__} {label}", architecture, kernel, item.grid, signature, constexprs,
        attributes, dict(parsed.__dict__), item.entries,
    )  # fmt: skip


SPILLED = {
    ("attention_backward_keys", "sm80", torch.bfloat16, 128, 32, False): 40,
    ("attention_backward_keys", "sm86", torch.bfloat16, 128, 32, False): 56,
    ("attention_backward_keys", "sm120", torch.bfloat16, 128, 32, False): 96,
    ("attention_backward_keys", "sm80", torch.bfloat16, 128, 32, True): 72,
    ("attention_backward_keys", "sm86", torch.bfloat16, 128, 32, True): 72,
    ("attention_backward_keys", "sm120", torch.bfloat16, 128, 32, True): 128,
    ("attention_backward_keys", "sm86", torch.bfloat16, 128, 16, True): 8,
    ("attention_backward_keys", "sm120", torch.bfloat16, 128, 16, True): 16,
    ("attention_backward_keys", "sm86", torch.bfloat16, 16, 32, True): 8,
    ("attention_backward_keys", "sm80", torch.float32, 64, 32, True): 8,
    ("attention_backward_keys", "sm86", torch.float32, 64, 32, True): 8,
    ("attention_backward_keys", "sm90", torch.float32, 128, 64, True): 40,
    ("attention_backward_queries", "sm86", torch.bfloat16, 128, 32, True): 16,
    ("attention_backward_queries", "sm120", torch.bfloat16, 128, 32, True): 24,
    ("attention_backward_queries", "sm86", torch.float32, 16, 16, True): 8,
    ("attention_backward_queries", "sm86", torch.float32, 16, 32, True): 8,
    ("attention_forward", "sm80", torch.float32, 64, 32, True): 8,
    ("attention_forward", "sm80", torch.float32, 128, 32, True): 8,
    ("attention_forward", "sm86", torch.float32, 64, 32, True): 8,
    ("attention_forward", "sm120", torch.bfloat16, 32, 64, True): 8,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 64, 32, True): 8,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 128, 32, True): 4,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 64, 16, True): 16,
    ("attention_backward_keys", "gfx942", torch.bfloat16, 128, 64, True): 8,
    ("attention_backward_keys", "gfx942", torch.float32, 16, 16, True): 4,
    ("attention_backward_keys", "gfx942", torch.float32, 32, 16, True): 24,
    ("attention_backward_keys", "gfx942", torch.float32, 32, 32, True): 4,
    ("attention_backward_keys", "gfx942", torch.float32, 64, 64, True): 20,
    ("attention_backward_keys", "gfx942", torch.float32, 128, 16, True): 24,
    ("attention_backward_keys", "gfx942", torch.float32, 128, 32, True): 20,
    ("attention_backward_keys", "gfx942", torch.float32, 128, 64, True): 8,
}
"""By kernel, chip, dtype, D, R and whether masked: bytes a lane that are known. docs/triton.md says more of them.

On gfx942 they are scalar registers, kept in lanes of vector registers: no instruction goes to memory.
"""


def _routed_attention(architecture: str) -> Iterator[Variant]:
    """Forward and backward for every dtype, D, rank and mask: of a detector's shape, on tensors of the meta device."""
    for dtype in DTYPES["routed_attention"]:
        name = str(dtype).removeprefix("torch.")
        for channels in (16, 32, 64, 128):
            yield from _of_attention(architecture, f"{name} D={channels}", dtype, channels)
        yield from _of_attention(architecture, f"{name} D=48 R=64 G=32", dtype, 48, rank=64, gate_rank=32)
        yield from _of_attention(architecture, f"{name} D=32 plain", dtype, 32, routed=False)
        yield from _of_attention(architecture, f"{name} D=32 masked", dtype, 32, masked=True)
        if dtype in HALF:
            yield from _of_attention(architecture, f"{name} D=32 float32 factors", dtype, 32, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):  # float16 is as bfloat16
        name = str(dtype).removeprefix("torch.")
        for channels, (rank, gate_rank), masked in itertools.product((16, 32, 64, 128), RANKS, (False, True)):
            label = f"{name} D={channels} R={rank} G={gate_rank}{' masked' if masked else ''}"
            yield from _of_attention(architecture, label, dtype, channels, None, rank, gate_rank, masked=masked)


def _of_attention(architecture, label, dtype, channels, factor_dtype=None, rank=16, gate_rank=3, routed=True,
              masked=False):  # fmt: skip
    batch, heads, queries = 2, 8, 1100

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (empty(batch, queries, heads, channels).transpose(1, 2) for _ in range(3))
    factors = (None,) * 6
    if routed:
        ranks = (rank, rank, rank, rank, gate_rank, gate_rank)
        factors = tuple(empty(batch, queries, r, dtype=factor_dtype or dtype) for r in ranks)
    mask = empty(queries, queries).expand(batch, heads, -1, -1) if masked else None
    ranges = empty(batch, queries, 2, 2, dtype=torch.int32) if masked else None
    output, lse = empty(batch, heads, queries, channels), empty(batch, heads, queries, dtype=torch.float32)
    call = (query, key, value, factors, 5.0, mask, ranges, 1.0)
    launches = (
        ("forward", lambda: routed_attention.forward(*call)),
        ("backward", lambda: routed_attention.backward(output, output, lse, *call)),
    )
    for direction, launch_all in launches:
        for variant in recorded("routed_attention", direction, label, architecture, launch_all):
            key = (variant.kernel.fn.__name__, architecture, dtype, channels, rank, masked)
            yield replace(variant, spilled_bytes=SPILLED.get(key, 0))


def _ms_deform_attn(architecture: str) -> Iterator[Variant]:
    """A detector's encoder for every dtype, with both ways to sum the gradient of value, and D of no power of two."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield from _ms_deform_attn_of(architecture, dtype, channels=32)
    yield from _ms_deform_attn_of(architecture, torch.bfloat16, channels=24)


def _ms_deform_attn_of(architecture: str, dtype: torch.dtype, channels: int) -> Iterator[Variant]:
    heads, point_dtype = 8, torch.promote_types(dtype, torch.float32)
    positions = sum(height * width for height, width in LEVELS)
    counts = (4,) * len(LEVELS)

    def empty(*shape: int, dtype: torch.dtype = point_dtype) -> torch.Tensor:
        return torch.empty(1, positions, heads, *shape, dtype=dtype, device="meta")

    value, locations, weights = empty(channels, dtype=dtype), empty(sum(counts), 2), empty(sum(counts))
    sizes = [size for pair in LEVELS for size in pair]
    points = Points(locations, weights, None, None, sizes, (0,) * len(LEVELS), counts)
    label = f"{str(dtype).removeprefix('torch.')} D={channels}"
    yield from recorded("ms_deform_attn", "forward", label, architecture, lambda: sample(value, points))
    for way, deterministic in (("", False), (" deterministic", True)):
        yield from recorded(
            "ms_deform_attn", "backward", label + way, architecture,
            lambda deterministic=deterministic: _backward(
                value.flatten(2), value, points, value, locations, weights, deterministic=deterministic
            ),
        )  # fmt: skip


def _ms_deform_attn_fused(architecture: str) -> Iterator[Variant]:
    """A detector's decoder for every dtype: boxes of each level, a mask, every gradient; with points, neither."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield from _ms_deform_attn_fused_of(architecture, dtype, coordinates=4, masked=True)
    yield from _ms_deform_attn_fused_of(architecture, torch.bfloat16, coordinates=2, masked=False)


def _ms_deform_attn_fused_of(
    architecture: str, dtype: torch.dtype, coordinates: int, masked: bool
) -> Iterator[Variant]:
    batch, queries, heads, channels, counts = 2, 900, 8, 32, (4, 4, 4, 4)
    sizes = (100, 167, 50, 84, 25, 42, 13, 21)
    positions = sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    point_dtype = torch.promote_types(dtype, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = point_dtype) -> torch.Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device="meta")

    value, mask = empty(positions, heads, channels, dtype=dtype), empty(positions, dtype=torch.bool)
    inputs = (
        value, sizes, (0,) * len(counts), empty(queries, len(counts), coordinates),
        empty(queries, heads, sum(counts), 2), empty(queries, heads, sum(counts)), counts, mask if masked else None,
    )  # fmt: skip
    grad_output = empty(queries, heads * channels, dtype=dtype)
    label = f"{str(dtype).removeprefix('torch.')} D={channels} coordinates={coordinates}"
    yield from recorded(
        "ms_deform_attn_fused", "forward", label, architecture, lambda: ms_deform_attn_fused.forward(*inputs)
    )
    yield from recorded(
        "ms_deform_attn_fused",
        "backward",
        label,
        architecture,
        lambda: ms_deform_attn_fused.backward(grad_output, *inputs, masked),
    )


def _query_similarity(architecture: str) -> Iterator[Variant]:
    """C of one and of several chunks, aligned and not, every dtype."""
    for dtype in DTYPES["query_similarity"]:
        for channels in (32, 250, 256, 1024):
            x = torch.empty(2, 1100, channels, dtype=dtype, device="meta")
            label = f"{str(dtype).removeprefix('torch.')} C={channels}"
            yield from recorded(
                "query_similarity", "forward", label, architecture, lambda x=x: query_similarity.forward(x)
            )


def _sigmoid_focal_loss(architecture: str) -> Iterator[Variant]:
    """Every dtype; one class, those of COCO and of LVIS; another gamma; without a gradient."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for classes in (1, 80, 91, 1203):
            yield from _sigmoid_focal_loss_of(architecture, dtype, classes)
    yield from _sigmoid_focal_loss_of(architecture, torch.bfloat16, 91, gamma=1.5, differentiated=False)


def _sigmoid_focal_loss_of(
    architecture, dtype, classes: int, gamma: float = 2.0, differentiated: bool = True
) -> Iterator[Variant]:
    logits = torch.empty(44446, classes, dtype=dtype, device="meta")
    targets = torch.empty(44446, dtype=torch.int64, device="meta")
    loss, grad = targets.to(accumulate_dtype(dtype)), logits if differentiated else None
    label = f"{str(dtype).removeprefix('torch.')} K={classes} gamma={gamma}"
    yield from recorded(
        "sigmoid_focal_loss", "forward", label, architecture,
        lambda: sigmoid_focal_loss.forward(logits, targets, 0.25, gamma, kept_scale(dtype), loss, grad),
    )  # fmt: skip
    if differentiated:
        yield from recorded(
            "sigmoid_focal_loss", "backward", label, architecture,
            lambda: sigmoid_focal_loss.backward(loss, logits, 1 / kept_scale(dtype), logits),
        )  # fmt: skip


def _add_layer_norm(architecture: str) -> Iterator[Variant]:
    """Every dtype with the channels of detectors; x^ of four channels kept, and all of it."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for width in (256, 384, 1024):
            yield from _add_layer_norm_of(architecture, dtype, width, kept=4)
    yield from _add_layer_norm_of(architecture, torch.bfloat16, 256, kept=256)


def _add_layer_norm_of(architecture: str, dtype: torch.dtype, width: int, kept: int) -> Iterator[Variant]:
    tokens, sums = 44446, accumulate_dtype(dtype)

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, weight, rstd, normalized = empty(tokens, width), empty(width), empty(tokens, of=sums), empty(tokens, kept)
    channels = empty(kept, of=torch.int32)
    label = f"{str(dtype).removeprefix('torch.')} C={width} kept={kept}"
    yield from recorded(
        "add_layer_norm", "forward", label, architecture,
        lambda: add_layer_norm.forward(x, x, weight, weight, 1e-5, channels, x, rstd, normalized),
    )  # fmt: skip
    sums = empty(512, 2, width, of=sums)
    yield from recorded(
        "add_layer_norm", "backward", label, architecture,
        lambda: add_layer_norm.backward(x, x, rstd, normalized, channels, weight, weight, x, sums),
    )  # fmt: skip


VARIANTS: dict[str, Callable[[str], Iterator[Variant]]] = {
    "routed_attention": _routed_attention,
    "query_similarity": _query_similarity,
    "ms_deform_attn": _ms_deform_attn,
    "ms_deform_attn_fused": _ms_deform_attn_fused,
    "add_layer_norm": _add_layer_norm,
    "sigmoid_focal_loss": _sigmoid_focal_loss,
}
