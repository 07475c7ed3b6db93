"""Every kernel that the ops can launch, for an architecture that need not be here: ahead of time, from real calls.

For each op this file calls forward and backward of `route_kernels.triton` on tensors of the meta device; the launches
that come of it, as they would be specialized on that architecture, are the op's variants.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from route_kernels.ops.sigmoid_focal_loss import kept_scale
from route_kernels.precision import accumulate_dtype
from route_kernels.triton.availability import DTYPES, FLOATING
from route_kernels.triton.block_sizes import HALF

from .launches import Launch, Recording, recording

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
LEVELS_ARGUMENT = (*itertools.chain(*LEVELS), *(0,) * len(LEVELS), *(4,) * len(LEVELS))


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


def recorded(op: str, direction: str, label: str, architecture: str, *arguments: Any) -> list[Variant]:
    """The variants that a kernel's entry point would launch on this architecture, of tensors of the meta device."""
    entry_point = getattr(import_module(f"route_kernels.triton.{op}"), direction)
    with recording(architecture) as record:
        entry_point(*arguments)
    return [_variant(op, direction, label, item, record) for item in record.launches]


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


def _variant(op: str, direction: str, label: str, item: Launch, record: Recording) -> Variant:
    kernel, backend, name = item.function, make_backend(TARGETS[record.architecture]), item.function.fn.__name__
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    settings = {**item.constants, "debug": False}
    bound, specialization, options = bind(*item.arguments, **settings)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, settings, bound, specialization, options)
    entries = frozenset(entry for entry in record.entries.items() if entry[0].endswith(name))
    return Variant(
        op, direction, f"{name} {label}", record.architecture, kernel, item.grid, signature, constexprs, attributes,
        dict(parsed.__dict__), entries,
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
    of = functools.partial(_of_attention, architecture)
    for dtype in DTYPES["routed_attention"]:
        for channels in (16, 32, 64, 128):
            yield from of(f"D={channels}", dtype, channels)
        yield from of("D=48 R=64 G=32", dtype, 48, ranks=(64, 32))
        yield from of("D=32 plain", dtype, 32, ranks=None)
        yield from of("D=32 masked", dtype, 32, masked=True)
        if dtype in HALF:
            yield from of("D=32 float32 factors", dtype, 32, factor_dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):  # float16 is as bfloat16
        for channels, ranks, masked in itertools.product((16, 32, 64, 128), RANKS, (False, True)):
            label = f"D={channels} R={ranks[0]} G={ranks[1]}{' masked' if masked else ''}"
            yield from of(label, dtype, channels, ranks=ranks, masked=masked)
        for channels in (32, 64):
            yield from of(f"D={channels} strength a tensor", dtype, channels, controlled=True)


def _of_attention(
    architecture: str, label: str, dtype: torch.dtype, channels: int, *, ranks: tuple[int, int] | None = (16, 3),
    factor_dtype: torch.dtype | None = None, masked: bool = False, controlled: bool = False,
) -> Iterator[Variant]:  # fmt: skip
    batch, heads, queries = 2, 8, 1100

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (empty(batch, queries, heads, channels).transpose(1, 2) for _ in range(3))
    rank, gate_rank = ranks or (0, 0)
    widths = (rank, rank, rank, rank, gate_rank, gate_rank) if ranks else ()
    routing = [empty(batch, queries, width, dtype=factor_dtype or dtype) for width in widths]
    output, lse = empty(batch, heads, queries, channels), empty(batch, heads, queries, dtype=torch.float32)
    grads = [output, output, output, *routing]
    if controlled:
        routing.append(empty(2, dtype=torch.float32))
        grads.append(empty(batch, queries, dtype=torch.float32))
    mask = empty(queries, queries).expand(batch, heads, -1, -1) if masked else None
    ranges = empty(batch, queries, 2, 2, dtype=torch.int32) if masked else None
    call = (query, key, value, routing, mask, ranges, (1.0, 1.0, 5.0))
    launches = (("forward", *call, output, lse), ("backward", output, output, lse, *call, grads))
    label = f"{_name(dtype)} {label}"
    for direction, *arguments in launches:
        for variant in recorded("routed_attention", direction, label, architecture, *arguments):
            key = (variant.kernel.fn.__name__, architecture, dtype, channels, rank or 16, masked)
            yield replace(variant, spilled_bytes=SPILLED.get(key, 0))


def _ms_deform_attn(architecture: str) -> Iterator[Variant]:
    """A detector's encoder for every dtype, with both ways to sum the gradient of value, and D of no power of two."""
    for dtype, channels in (*((dtype, 32) for dtype in FLOATING), (torch.bfloat16, 24)):
        heads, points = 8, 4 * len(LEVELS)
        positions = sum(height * width for height, width in LEVELS)
        point_dtype = torch.promote_types(dtype, torch.float32)
        value = torch.empty(1, positions, heads, channels, dtype=dtype, device="meta")
        locations = torch.empty(1, positions, heads, points, 2, dtype=point_dtype, device="meta")
        weights = locations[..., 0].contiguous()
        output, label = value.flatten(2), f"{_name(dtype)} D={channels}"
        inputs, grads = (value, LEVELS_ARGUMENT, locations, weights), [value, locations, weights]
        yield from recorded("ms_deform_attn", "forward", label, architecture, *inputs, output)
        for way, deterministic in (("", False), (" deterministic", True)):
            yield from recorded(
                "ms_deform_attn", "backward", label + way, architecture,
                output, *inputs, deterministic, grads,
            )  # fmt: skip


def _ms_deform_attn_fused(architecture: str) -> Iterator[Variant]:
    """A detector's decoder for every dtype: boxes of each level, a mask, every gradient; with points, neither."""
    op, (batch, queries, heads, channels) = "ms_deform_attn_fused", (2, 900, 8, 32)
    positions, points = sum(height * width for height, width in LEVELS), 4 * len(LEVELS)
    for dtype, coordinates, masked in (*((dtype, 4, True) for dtype in FLOATING), (torch.bfloat16, 2, False)):
        point_dtype = torch.promote_types(dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = point_dtype) -> torch.Tensor:
            return torch.empty(batch, *shape, dtype=dtype, device="meta")

        value, mask = empty(positions, heads, channels, dtype=dtype), empty(positions, dtype=torch.bool)
        offsets, logits = empty(queries, heads, points, 2), empty(queries, heads, points)
        references = empty(queries, len(LEVELS), coordinates)
        output = empty(queries, heads * channels, dtype=dtype)
        inputs = (value, LEVELS_ARGUMENT, references, offsets, logits, mask if masked else None)
        grads = [value, offsets, logits, *([references] if masked else [])]
        label = f"{_name(dtype)} D={channels} coordinates={coordinates}"
        yield from recorded(op, "forward", label, architecture, *inputs, output)
        yield from recorded(op, "backward", label, architecture, output, *inputs, False, grads)


def _query_similarity(architecture: str) -> Iterator[Variant]:
    """C of one and of several chunks, aligned and not, every dtype."""
    for dtype in DTYPES["query_similarity"]:
        for channels in (32, 250, 256, 1024):
            x = torch.empty(2, 1100, channels, dtype=dtype, device="meta")
            label, output = f"{_name(dtype)} C={channels}", x.new_empty(2, 1100)
            yield from recorded("query_similarity", "forward", label, architecture, x, output)


def _sigmoid_focal_loss(architecture: str) -> Iterator[Variant]:
    """Every dtype; one class, those of COCO and of LVIS; another gamma; without a gradient."""
    op, kinds = "sigmoid_focal_loss", itertools.product(FLOATING, (1, 80, 91, 1203), (2.0,), (True,))
    for dtype, classes, gamma, differentiated in (*kinds, (torch.bfloat16, 91, 1.5, False)):
        logits = torch.empty(44446, classes, dtype=dtype, device="meta")
        targets = torch.empty(44446, dtype=torch.int64, device="meta")
        loss, grad = targets.to(accumulate_dtype(dtype)), logits if differentiated else None
        label, scale = f"{_name(dtype)} K={classes} gamma={gamma}", kept_scale(dtype)
        yield from recorded(
            op, "forward", label, architecture,
            logits, targets, 0.25, gamma, scale, loss, grad,
        )  # fmt: skip
        if differentiated:
            yield from recorded(
                op, "backward", label, architecture,
                loss, logits, 1 / scale, [logits],
            )  # fmt: skip


def _add_layer_norm(architecture: str) -> Iterator[Variant]:
    """Every dtype with the channels of detectors; x^ of four channels kept, and all of it."""
    for dtype, width, kept in (*itertools.product(FLOATING, (256, 384, 1024), (4,)), (torch.bfloat16, 256, 256)):
        tokens, accumulate = 44446, accumulate_dtype(dtype)
        x = torch.empty(tokens, width, dtype=dtype, device="meta")
        weight, rstd, normalized = x[0], x.new_empty(tokens, dtype=accumulate), x.new_empty(tokens, kept)
        channels, sums = x.new_empty(kept, dtype=torch.int32), x.new_empty(512, 2, width, dtype=accumulate)
        label = f"{_name(dtype)} C={width} kept={kept}"
        yield from recorded(
            "add_layer_norm", "forward", label, architecture,
            x, x, weight, weight, channels, 1e-5, x, rstd, normalized,
        )  # fmt: skip
        yield from recorded(
            "add_layer_norm", "backward", label, architecture,
            x, x, rstd, normalized, channels, weight, weight, [x, sums],
        )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


VARIANTS: dict[str, Callable[[str], Iterator[Variant]]] = {
    "routed_attention": _routed_attention,
    "query_similarity": _query_similarity,
    "ms_deform_attn": _ms_deform_attn,
    "ms_deform_attn_fused": _ms_deform_attn_fused,
    "add_layer_norm": _add_layer_norm,
    "sigmoid_focal_loss": _sigmoid_focal_loss,
}
