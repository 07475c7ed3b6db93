"""Self-attention with the learned pairwise bias of Route-DETR (arXiv 2512.13876), in one pass.

    p_ij = sigmoid(gate_q_i . gate_k_j)
    r_ij = p_ij (sup_q_i . sup_k_j) + (1 - p_ij)(del_q_i . del_k_j)
    b_ij = clamp(r_ij, -limit, +limit)                        one bias, shared by all heads
    S_hij = scale q_hi . k_hj + b_ij + mask_ij
    O_hi  = sum_j softmax_j(S_hij) v_hj

B batch, H heads, N queries, M keys, D channels of one head, R rank of a product, G rank of the gate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import backends, reference
from ..reference.precision import accumulate_dtype, autocast_dtype
from .contract import (
    FLOATING,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    last_dim_contiguous,
    number,
)
from .registry import register, register_backward

OP = "routed_attention"


class RoutingFactors(NamedTuple):
    """What the pairwise bias is made of: b = clamp(p sup + (1 - p) del), p = sigmoid(gate).

    Sign, strength and 1/sqrt(R) are already folded into the suppressor and delegator factors.
    All six have one dtype: the query's, or the dtype it is accumulated in (float32; float64 for float64).
    `torch.compile` takes `limit` for a constant: a new value compiles once more.
    """

    sup_q: torch.Tensor  # [B, N, R]
    sup_k: torch.Tensor  # [B, M, R]
    del_q: torch.Tensor  # [B, N, R]
    del_k: torch.Tensor  # [B, M, R]
    gate_q: torch.Tensor  # [B, N, G]
    gate_k: torch.Tensor  # [B, M, G]
    limit: float | None = None


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routing: RoutingFactors | None = None,
    *,
    attn_mask: torch.Tensor | None = None,
    key_ranges: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention whose logits carry a low-rank, gated bias (arXiv 2512.13876); nothing of N x M elements is allocated.

    Args:
        query: [B, H, N, D], float16, bfloat16, float32 or float64, any strides.
        key: [B, H, M, D], dtype of query.
        value: [B, H, M, D], dtype of query.
        routing: the factors of the bias; None is plain attention.
        attn_mask: broadcastable to [B, H, N, M]; bool (True = may attend) or floating (added); no gradient.
        key_ranges: int32 [N, 2, 2] or [B, N, 2, 2]; query i may attend key j iff start0 <= j < end0 or
            start1 <= j < end1. Both masks together: a key must pass both.
        scale: factor of q . k; None is 1/sqrt(D).

    Returns:
        [B, H, N, D] in the dtype of query. A query with no key to attend gives 0 and has zero gradients.
        Under autocast floating inputs are cast to the autocast dtype (the factors stay as they are).

    Precision:
        Backward takes T_hi = dO_hi . O_hi from the O that is returned, as FlashAttention does (arXiv 2205.14135,
        algorithm 4). Beside a bfloat16 query, O is rounded to 8 bits: the gradients of float32 factors then have an
        error of 3e-4 to 2e-3 of their norm, below what PyTorch's own flash backward makes in dq, dk and dv
        (tests/test_routed_attention.py holds both); with a float32 query it is below 1e-6. An exact T would need O in
        float32, B H N D numbers more, or another pass over all pairs.

    Raises:
        ValueError: a shape, device or the limit is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        BackendUnavailableError: an explicitly requested backend cannot run.
        RuntimeError: a second derivative was asked of a fused kernel.
    """
    if routing is not None and not isinstance(routing, RoutingFactors):
        raise TypeError(f"{OP}: routing: expected RoutingFactors or None, got {type(routing).__name__}")
    masks = {"attn_mask": attn_mask, "key_ranges": key_ranges}
    expect_tensors(OP, query=query, key=key, value=value, **{k: mask for k, mask in masks.items() if mask is not None})
    query, key, value = _autocast(query, key, value)
    factors: tuple = (None,) * 7
    if routing is not None:
        _expect_factors(OP, routing)
        limit = None if routing.limit is None else number(OP, "routing.limit", routing.limit)
        factors = (*routing[:6], limit)
    scale = None if scale is None else number(OP, "scale", scale)
    chosen = backends.choose(OP, query, key, value, *factors[:6])
    if chosen in backends.PLAIN:
        check(query, key, value, *factors, attn_mask, key_ranges, scale)
        return backends.PLAIN[chosen].routed_attention(
            query, key, value, None if routing is None else factors[:6], factors[6], attn_mask, key_ranges,
            _scale(query, scale),
        )  # fmt: skip
    return torch.ops.route_kernels.routed_attention(query, key, value, *factors, attn_mask, key_ranges, scale, chosen)[
        0
    ]


def routing_bias(routing: RoutingFactors) -> torch.Tensor:
    """The bias that `routed_attention` adds, written out as [B, N, M]: for inspection and pictures only.

    Raises:
        ValueError, TypeError: as `routed_attention`.
    """
    if not isinstance(routing, RoutingFactors):
        raise TypeError(f"routing_bias: routing: expected RoutingFactors, got {type(routing).__name__}")
    _expect_factors("routing_bias", routing)
    limit = None if routing.limit is None else number("routing_bias", "routing.limit", routing.limit)
    expect_shape("routing_bias", "routing.sup_q", routing.sup_q, "B", "N", "R")
    expect_shape("routing_bias", "routing.sup_k", routing.sup_k, "B", "M", "R")
    _check_factors("routing_bias", *routing.sup_q.shape[:2], routing.sup_k.shape[1], routing._replace(limit=limit))
    dtype, accumulate = routing.sup_q.dtype, accumulate_dtype(routing.sup_q.dtype)
    return reference.routing_bias(*(x.to(accumulate) for x in routing[:6]), limit).to(dtype)


def check(query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit, attn_mask, key_ranges, scale) -> None:
    """The contract, for real and fake tensors alike."""
    expect_shape(OP, "query", query, "B", "H", "N", "D")
    batch, heads, queries, channels = query.shape
    expect_shape(OP, "key", key, ("B", batch), ("H", heads), "M", ("D", channels))
    keys = key.shape[2]
    expect_shape(OP, "value", value, ("B", batch), ("H", heads), ("M", keys), ("D", channels))
    expect_floating(OP, "query", query)
    expect_floating(OP, "key", key, (query.dtype,))
    expect_floating(OP, "value", value, (query.dtype,))
    if channels == 0 and scale is None:
        raise ValueError(f"{OP}: query: expected D >= 1 for the default scale 1/sqrt(D), got D = 0")
    factors = (sup_q, sup_k, del_q, del_k, gate_q, gate_k)
    if any(factor is not None for factor in factors):
        _check_factors(OP, batch, queries, keys, RoutingFactors(*factors, limit))
        expect_floating(OP, "routing.sup_q", sup_q, (query.dtype, accumulate_dtype(query.dtype)))
    if attn_mask is not None:
        _check_attn_mask(attn_mask, (batch, heads, queries, keys))
    if key_ranges is not None:
        if key_ranges.dim() == 4:
            expect_shape(OP, "key_ranges", key_ranges, ("B", batch), ("N", queries), ("", 2), ("", 2))
        else:
            expect_shape(OP, "key_ranges", key_ranges, ("N", queries), ("", 2), ("", 2))
        expect_floating(OP, "key_ranges", key_ranges, (torch.int32,))
    expect_same_device(
        OP, ("query", query), key=key, value=value, sup_q=sup_q, sup_k=sup_k, del_q=del_q, del_k=del_k,
        gate_q=gate_q, gate_k=gate_k, attn_mask=attn_mask, key_ranges=key_ranges,
    )  # fmt: skip


def _expect_factors(op: str, routing: RoutingFactors) -> None:
    named = zip(RoutingFactors._fields[:6], routing[:6], strict=True)
    expect_tensors(op, **{f"routing.{name}": factor for name, factor in named})


def _check_factors(op: str, b: int, n: int, m: int, routing: RoutingFactors) -> None:
    for name, factor in zip(RoutingFactors._fields[:6], routing[:6], strict=True):
        expect_floating(op, f"routing.{name}", factor, (routing.sup_q.dtype,))
    expect_shape(op, "routing.sup_q", routing.sup_q, ("B", b), ("N", n), "R")
    rank = routing.sup_q.shape[2]
    expect_shape(op, "routing.sup_k", routing.sup_k, ("B", b), ("M", m), ("R", rank))
    expect_shape(op, "routing.del_q", routing.del_q, ("B", b), ("N", n), "R")
    expect_shape(op, "routing.del_k", routing.del_k, ("B", b), ("M", m), ("R", routing.del_q.shape[2]))
    expect_shape(op, "routing.gate_q", routing.gate_q, ("B", b), ("N", n), "G")
    expect_shape(op, "routing.gate_k", routing.gate_k, ("B", b), ("M", m), ("G", routing.gate_q.shape[2]))
    if routing.limit is not None and not routing.limit >= 0:
        raise ValueError(f"{op}: routing.limit: expected a number >= 0 or None, got {routing.limit}")


def _check_attn_mask(attn_mask: torch.Tensor, full: tuple[int, ...]) -> None:
    if attn_mask.dtype not in (torch.bool, *FLOATING):
        raise TypeError(f"{OP}: attn_mask: expected dtype bool or floating of 16 to 64 bits, got {attn_mask.dtype}")
    if attn_mask.requires_grad:
        raise ValueError(f"{OP}: attn_mask: has no gradient here, expected requires_grad=False; detach it")
    fits = attn_mask.dim() <= 4 and all(
        size == 1 or size == wanted for size, wanted in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{OP}: attn_mask: expected a shape broadcastable to [B, H, N, M] = {list(full)}, "
            f"got {list(attn_mask.shape)}"
        )


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v in the autocast dtype, as scaled_dot_product_attention; float64 is left alone."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None or any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    return tuple(tensor.to(dtype) for tensor in tensors)


def _kernel_views(query, key, factors, attn_mask, key_ranges):
    """What the kernels read: contiguous rows, masks as strided views over [B, H, N, M] and [B, N, 2, 2] (no copies)."""
    factors = tuple(None if x is None else last_dim_contiguous(x) for x in factors)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if key_ranges is not None:
        key_ranges = key_ranges.contiguous().expand(query.shape[0], -1, -1, -1)
    return factors, attn_mask, key_ranges


def _kernel(
    query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit, attn_mask, key_ranges, scale, backend
):
    check(query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit, attn_mask, key_ranges, scale)
    chosen = backends.resolve(OP, backend, query)
    query, key, value = map(last_dim_contiguous, (query, key, value))
    factors = (sup_q, sup_k, del_q, del_k, gate_q, gate_k)
    factors, attn_mask, key_ranges = _kernel_views(query, key, factors, attn_mask, key_ranges)
    return _FORWARD[chosen](query, key, value, factors, limit, attn_mask, key_ranges, _scale(query, scale))


def _fake(query, *args):
    check(query, *args[:-1])
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))


def _backward_kernel(
    grad_output, output, lse, query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit,
    attn_mask, key_ranges, scale, backend,
):  # fmt: skip
    chosen = backends.resolve(OP, backend, query)
    grad_output, query, key, value = map(last_dim_contiguous, (grad_output, query, key, value))
    factors = (sup_q, sup_k, del_q, del_k, gate_q, gate_k)
    factors, attn_mask, key_ranges = _kernel_views(query, key, factors, attn_mask, key_ranges)
    return _BACKWARD[chosen](
        grad_output, output, lse, query, key, value, factors, limit, attn_mask, key_ranges, _scale(query, scale)
    )


def _backward_fake(grad_output, output, lse, query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k, *settings):
    inputs = (query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def _cpu_forward(query, key, value, factors, limit, mask, key_ranges, scale):
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))
    torch.ops.route_kernels_native.routed_attention_forward(
        query, key, value, *factors, limit, mask, key_ranges, scale, output, lse
    )
    return output, lse


def _cpu_backward(grad_output, output, lse, query, key, value, factors, limit, mask, key_ranges, scale):
    grads = [x.new_empty(x.shape) for x in (query, key, value, *factors) if x is not None]
    factor_grads = grads[3:] if len(grads) > 3 else [None] * 6
    torch.ops.route_kernels_native.routed_attention_backward(
        grad_output, output, lse, query, key, value, *factors, limit, mask, key_ranges, scale,
        *grads[:3], *factor_grads,
    )  # fmt: skip
    return grads


def _triton_forward(*args):
    from ..triton.routed_attention import forward

    return forward(*args)


def _triton_backward(*args):
    from ..triton.routed_attention import backward

    return backward(*args)


_FORWARD = {"cpu": _cpu_forward, "triton": _triton_forward}
_BACKWARD = {"cpu": _cpu_backward, "triton": _triton_backward}


def _setup_context(ctx, inputs, output):
    *tensors, limit, attn_mask, key_ranges, scale, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, attn_mask, key_ranges, out, lse)
    ctx.limit, ctx.scale, ctx.backend = limit, scale, backend


def _backward(ctx, grad_output, _grad_lse):
    *tensors, attn_mask, key_ranges, output, lse = ctx.saved_tensors
    grads = torch.ops.route_kernels.routed_attention_backward(
        grad_output, output, lse, *tensors, ctx.limit, attn_mask, key_ranges, ctx.scale, ctx.backend
    )
    grads = [*grads, *(None,) * (9 - len(grads))]
    return *grads, None, None, None, None, None


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sup_q, Tensor? sup_k, Tensor? del_q, Tensor? del_k, "
    "Tensor? gate_q, Tensor? gate_k, float? limit, Tensor? attn_mask, Tensor? key_ranges, float? scale, str? backend"
)

register(
    f"routed_attention({_INPUTS}) -> (Tensor output, Tensor lse)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
register_backward(
    OP,
    f"routed_attention_backward(Tensor grad_output, Tensor output, Tensor lse, {_INPUTS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
