"""Who else computes our ops: the public code, the compiler, packages, and another backend of ours.

Whoever cannot run where it is called raises `Unavailable` with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import route_kernels as rk
from route_kernels.testing import EAGER, Arguments, named_tensors

from .registry import Case, Contender, Unavailable, ours
from .work import R50_POSITIONS

FORMULA = EAGER["routed_attention"]
DTYPES = ((torch.bfloat16, "bf16"), (torch.float32, "f32"))
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def package(name: str, module: str) -> ModuleType:
    """A package to compare with."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a wrong Python or PyTorch raises what it likes
        raise Unavailable(f"{name} cannot be imported: {error}") from error


def on_gpu(name: str, tensor: Tensor) -> None:
    """Raises where a contender that needs a GPU was given something else."""
    if tensor.device.type != "cuda":
        raise Unavailable(f"{name} needs a GPU")


def differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` through torch.compile, made when it is first called."""

    @cache
    def made() -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False)

    return lambda **arguments: made()(**arguments)


def compiled_eager(op: str) -> Contender:
    """The op as PyTorch users write it, through torch.compile."""
    return Contender("eager, torch.compile", compiled(EAGER[op]), EAGER[op])


def rows_of_queries(
    op: str, make: Callable[..., Arguments], contenders: Sequence[Contender], device: str
) -> list[Case]:
    """Rows of an op that takes every query by itself: those of a decoder and of an encoder."""
    if device == "cuda":
        return [
            Case(
                op, f"B 2 N {R50_POSITIONS} {suffix}", True, partial(make, batch=2, queries=R50_POSITIONS, dtype=dtype),
                (*contenders, compiled_eager(op)), part=op,
            )
            for dtype, suffix in DTYPES
        ]  # fmt: skip
    return [
        Case(op, f"B 1 N {n}", True, partial(make, batch=1, queries=n), contenders, quick=n == 900)
        for n in (900, R50_POSITIONS)
    ]


def on_backend(op: str, backend: str) -> Contender:
    """Our op on one of its backends, whichever is the fastest."""

    def call(**arguments: Any) -> Tensor:
        runs, reason = rk.can_run(op, backend, *(tensor for _, tensor in named_tensors(arguments)))
        if not runs:
            raise Unavailable(reason)
        with rk.backend(backend):
            return getattr(rk, op)(**arguments)

    return Contender(f"ours, {backend}", call, EAGER[op])


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def in_the_fast_mode(op: str) -> tuple[Contender, Contender]:
    """Ours as a deterministic step calls it, and as others do."""
    public = ours(op)
    return (
        Contender(public.name, public.call, public.formula, around=deterministic),
        Contender("ours, not deterministic", public.call, public.formula),
    )


# ---- routed attention ------------------------------------------------------------------------------------------------


def public_code(query: Tensor, key: Tensor, value: Tensor, routing: rk.RoutingFactors) -> Tensor:
    """Attention like that of Dual-R-DETR's QueryRouter and nn.MultiheadAttention: the bias repeated for every head."""
    bias = _bias(routing).to(query.dtype)
    repeated = bias.repeat_interleave(query.shape[1], dim=0)  # [B H, N, M]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=repeated.unflatten(0, query.shape[:2]))


def _bias(routing: rk.RoutingFactors) -> Tensor:
    """[B, N, M]"""
    p = torch.sigmoid(routing.gate_q @ routing.gate_k.mT)
    r = p * (routing.sup_q @ routing.sup_k.mT) + (1 - p) * (routing.del_q @ routing.del_k.mT)
    return r.clamp(-routing.limit, routing.limit)


def factored_score_mod(routing: rk.RoutingFactors) -> ScoreMod:
    """The bias of one pair from its factors; FlexAttention adds up their gradients by atomics."""
    sup_q, sup_k, del_q, del_k, gate_q, gate_k = (_Rows(factor) for factor in routing[:6])
    limit = routing.limit

    def product(of_query: _Rows, of_key: _Rows, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        total = of_query.at(b, i, 0) * of_key.at(b, j, 0)
        for r in range(1, of_query.rank):  # a score_mod may not reduce
            total = total + of_query.at(b, i, r) * of_key.at(b, j, r)
        return total

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = torch.sigmoid(product(gate_q, gate_k, b, i, j))
        delegated = product(del_q, del_k, b, i, j)
        r = delegated + p * (product(sup_q, sup_k, b, i, j) - delegated)
        return score + torch.clamp(r, -limit, limit)

    return score_mod


class _Rows:
    """A factor [B, N, R] as FlexAttention can differentiate it: contiguous, every index a tensor."""

    def __init__(self, factor: Tensor) -> None:
        _, self.rows, self.rank = factor.shape
        self.flat = factor.reshape(-1)

    def at(self, b: Tensor, row: Tensor, r: int) -> Tensor:
        return self.flat[(b * self.rows + row) * self.rank + r]


def looked_up_score_mod(bias: Tensor) -> ScoreMod:
    """The bias of one pair out of a [B, N, M] that was written out before."""
    return lambda score, b, h, i, j: score + bias[b, i, j]


def _flex(score_mod_of: Callable[[Any], ScoreMod]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Any) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, score_mod=score_mod_of(captured))

    return attend


def flex_factored(query: Tensor, key: Tensor, value: Tensor, routing: rk.RoutingFactors) -> Tensor:
    """Factors in float32: sums by atomics in bfloat16 would be wrong."""
    _flex_differentiates(query)
    factors = rk.RoutingFactors(*(factor.float() for factor in routing[:6]), *routing[6:])
    return _compiled_factored(query=query, key=key, value=value, captured=factors)


def flex_looked_up(query: Tensor, key: Tensor, value: Tensor, routing: rk.RoutingFactors) -> Tensor:
    """The bias in float32, for the same reason."""
    _flex_differentiates(query)
    bias = _compiled_bias(routing=routing).float()
    return _compiled_looked_up(query=query, key=key, value=value, captured=bias)


def _flex_differentiates(query: Tensor) -> None:
    if query.device.type == "cpu" and differentiated(query):
        raise Unavailable("FlexAttention has no backward on a CPU")


_compiled_factored = compiled(_flex(factored_score_mod))
_compiled_looked_up = compiled(_flex(looked_up_score_mod))
_compiled_bias = compiled(_bias)


def ungated(query: Tensor, key: Tensor, value: Tensor, sup_q: Tensor, sup_k: Tensor) -> Tensor:
    """Attention with a bias of low rank, neither gated nor clamped: what a concatenation can express."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(sup_q @ sup_k.mT).unsqueeze(1))


def concatenated(query: Tensor, key: Tensor, value: Tensor, sup_q: Tensor, sup_k: Tensor) -> Tensor:
    """FlashBias (arXiv 2505.12044): factors behind the channels of q and k; v is as wide, for flash kernels."""
    heads, channels = query.shape[1], query.shape[3]
    sup_q, sup_k = (factor.unsqueeze(1).expand(-1, heads, -1, -1) for factor in (sup_q * channels**0.5, sup_k))
    query, key = torch.cat([query, sup_q], dim=-1), torch.cat([key, sup_k], dim=-1)
    value = F.pad(value, (0, sup_k.shape[-1]))
    return F.scaled_dot_product_attention(query, key, value, scale=channels**-0.5)[..., :channels]


def _ungated_arguments(arguments: Arguments) -> Arguments:
    routing = arguments["routing"]
    return {**_without_routing(arguments), "sup_q": routing.sup_q, "sup_k": routing.sup_k}


def _without_routing(arguments: Arguments) -> Arguments:
    return {name: arguments[name] for name in ("query", "key", "value")}


def triangle_attention(query: Tensor, key: Tensor, value: Tensor, routing: rk.RoutingFactors) -> Tensor:
    """cuEquivariance's attention with a pair bias, the bias written out for every head."""
    on_gpu("cuEquivariance", query)
    attend = package("cuEquivariance", "cuequivariance_torch").triangle_attention
    bias = _bias(routing).float()[:, None, None].expand(-1, -1, query.shape[1], -1, -1).contiguous()
    query, key, value = (each.unsqueeze(1) for each in (query, key, value))  # [B, 1, H, N, D]
    return attend(query, key, value, bias, scale=query.shape[-1] ** -0.5).squeeze(1)


PLAIN_SDPA = Contender("plain SDPA, no bias", F.scaled_dot_product_attention, FORMULA, _without_routing)
FLASH_BIAS = Contender("FlashBias' concatenation, no gate", concatenated, ungated, _ungated_arguments)
TRIANGLE = Contender("cuEquivariance, bias written out", triangle_attention, FORMULA)
PUBLIC = Contender("public code", public_code, FORMULA)
COMPILED_PUBLIC = Contender("public code, torch.compile", compiled(public_code), FORMULA)
FLEX_FACTORED = Contender("FlexAttention, factors in score_mod", flex_factored, FORMULA)
FLEX_LOOKED_UP = Contender("FlexAttention, bias looked up", flex_looked_up, FORMULA)


# ---- deformable attention --------------------------------------------------------------------------------------------

MS_DEFORM_ATTN, FUSED = "ms_deform_attn", "ms_deform_attn_fused"
PEER, DEFORMOPS, MMCV = "torch-ms-deform-attn 0.1.1", "deformops 3.0.1", "mmcv's op"
Levels = Sequence[tuple[int, int]]


@cache  # a copy to a GPU cannot be captured into a graph
def level_tensors(spatial_shapes: Levels, device: torch.device) -> tuple[Tensor, Tensor]:
    """[L, 2] and [L], as packages take them."""
    shapes = torch.tensor(spatial_shapes)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return shapes.to(device), starts.to(device)


def equal_points(name: str, points: Sequence[int] | None) -> None:
    """Raises for a contender that knows no others."""
    if points is not None:
        raise Unavailable(f"{name} takes as many points on every level")


def _torch_ms_deform_attn(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points=None
) -> Tensor:
    equal_points(PEER, points)
    shapes, starts = level_tensors(tuple(spatial_shapes), value.device)
    op = package(PEER, "torch_ms_deform_attn").ms_deform_attn
    return op(value, shapes, starts, sampling_locations, attention_weights)


def _mmcv(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points=None) -> Tensor:
    equal_points(MMCV, points)
    on_gpu(MMCV, value)
    shapes, starts = level_tensors(tuple(spatial_shapes), value.device)
    op = package(MMCV, "mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
    return op.apply(value, shapes, starts, sampling_locations.to(value.dtype), attention_weights.to(value.dtype), 64)


def deformops(backend: str, **options: bool) -> Callable[..., Tensor]:
    """`ms_deform_attn` by a backend of deformops: eager on a CPU, Triton and CUDA on a GPU."""

    def call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points=None) -> Tensor:
        equal_points(DEFORMOPS, points)
        registry = _deformops_registry(value, backend)
        shapes, starts = level_tensors(tuple(spatial_shapes), value.device)
        weights = attention_weights.flatten(3) if "method" in options else attention_weights
        chosen = registry.Backend[backend]
        return registry.msda(value, shapes, starts, sampling_locations, weights, backend=chosen, **options)

    return call


def _deformops_registry(value: Tensor, backend: str) -> ModuleType:
    if backend == "EAGER":
        if value.device.type != "cpu":
            raise Unavailable(f"{DEFORMOPS} has kernels here: its eager form is for a CPU")
    else:
        on_gpu(f"{DEFORMOPS}, {backend}", value)
    return package(DEFORMOPS, "deformops.registry")


def deformops_fused(backend: str) -> Callable[..., Tensor]:
    """`ms_deform_attn_fused`: deformops has the softmax in its kernel, locations are made before."""
    sample = deformops(backend, method="softmax")

    def call(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points=None) -> Tensor:
        equal_points(DEFORMOPS, points)
        _deformops_registry(value, backend)
        locations = located(spatial_shapes, reference_points, sampling_offsets)
        return sample(value, spatial_shapes, None, locations, attention_logits)

    return call


@cache
def _widths_and_heights(spatial_shapes: Levels, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([(width, height) for height, width in spatial_shapes], dtype=dtype).to(device)  # [L, 2]


def located(spatial_shapes: Levels, reference_points: Tensor, sampling_offsets: Tensor) -> Tensor:
    """Locations [B, N, H, L, P, 2] of offsets [B, N, H, K, 2] in pixels of each level."""
    sizes = _widths_and_heights(tuple(spatial_shapes), sampling_offsets.dtype, sampling_offsets.device)
    offsets = sampling_offsets.unflatten(3, (len(spatial_shapes), -1)) / sizes[:, None]
    return reference_points[:, :, None, :, None] + offsets


FLOAT32_SUMS = f"{DEFORMOPS}, Triton, float32 sums"
PEERS = (
    Contender(PEER, _torch_ms_deform_attn, EAGER[MS_DEFORM_ATTN]),
    Contender(f"{DEFORMOPS}, eager", deformops("EAGER"), EAGER[MS_DEFORM_ATTN]),
    Contender(FLOAT32_SUMS, deformops("TRITON", fp32acc=True), EAGER[MS_DEFORM_ATTN]),
    Contender(f"{DEFORMOPS}, Triton", deformops("TRITON", fp32acc=False), EAGER[MS_DEFORM_ATTN]),
    Contender(f"{DEFORMOPS}, CUDA", deformops("CUDA"), EAGER[MS_DEFORM_ATTN]),
    Contender(MMCV, _mmcv, EAGER[MS_DEFORM_ATTN]),
)
FUSED_PEERS = tuple(
    Contender(f"{DEFORMOPS}, {name}, locations apart", deformops_fused(name.upper()), EAGER[FUSED])
    for name in ("eager", "Triton", "CUDA")
)
