"""Self-attention with the learned pairwise bias of Route-DETR (arXiv 2512.13876), in one pass.

    p_ij = sigmoid(gate_q_i . gate_k_j)
    r_ij = p_ij (sup_q_i . sup_k_j) + (1 - p_ij)(del_q_i . del_k_j)
    b_ij = strength clamp(r_ij, -limit, +limit)               one bias, shared by all heads
    S_hij = scale q_hi . k_hj + b_ij + mask_ij
    O_hi  = sum_j softmax_j(S_hij) v_hj

B batch, H heads, N queries, M keys, D channels of one head, R rank of a product, G rank of the gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import backends, reference
from ..precision import FLOATING, accumulate_dtype, autocast_dtype
from ..triton.availability import LIMITS, Limits
from .contract import (
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    last_dim_contiguous,
    number,
    number_or_tensor,
)
from .flop import count_flop
from .registry import Backward, register
from .workspace import count_workspace

OP = "routed_attention"
LIMITS[OP] = Limits(FLOATING[:3], {4: ("D", 128), 3: ("R and G", 64)})  # what registers and shared memory hold


class RoutingFactors(NamedTuple):
    """Factors of the pairwise bias b = strength clamp(p sup + (1 - p) del), p = sigmoid(gate).

    Sign and 1/sqrt(R) are already folded into the suppressor and delegator factors.
    All six have one dtype: the query's, or the dtype it is accumulated in (float32; float64 for float64).

    `limit` and `strength` are numbers, or tensors without dimensions on the device of the factors. `torch.compile`
    takes numbers for constants: a new value compiles once more. A tensor is read by the kernel alone: its value may
    change from step to step in one compiled graph or CUDA graph. `strength` has a gradient where it asks for one,
    `limit` has none.
    """

    sup_q: torch.Tensor  # [B, N, R]
    sup_k: torch.Tensor  # [B, M, R]
    del_q: torch.Tensor  # [B, N, R]
    del_k: torch.Tensor  # [B, M, R]
    gate_q: torch.Tensor  # [B, N, G]
    gate_k: torch.Tensor  # [B, M, G]
    limit: float | torch.Tensor | None = None
    strength: float | torch.Tensor = 1.0


_FACTORS = tuple(f"routing.{name}" for name in RoutingFactors._fields[:6])


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
    if routing is not None:
        routing = _expect_factors(OP, routing)
    scale = None if scale is None else number(OP, "scale", scale)
    chosen = backends.choose(OP, query, key, value, (routing or ())[:6])
    plain = backends.plain(OP, chosen)
    if plain is not None:
        check(_Call(query, key, value, *_numbers_of(routing), attn_mask, key_ranges, scale))
        return plain(query, key, value, routing, attn_mask, key_ranges, _scale(query, scale))
    packed = _packed(routing, query)
    return torch.ops.route_kernels.routed_attention(query, key, value, *packed, attn_mask, key_ranges, scale, chosen)[0]


def routing_bias(routing: RoutingFactors) -> torch.Tensor:
    """The bias that `routed_attention` adds, written out as [B, N, M]: for inspection and pictures only.

    Raises:
        ValueError, TypeError: as `routed_attention`.
    """
    op = "routing_bias"
    if not isinstance(routing, RoutingFactors):
        raise TypeError(f"{op}: routing: expected RoutingFactors, got {type(routing).__name__}")
    routing = _expect_factors(op, routing)
    expect_shape(op, "routing.sup_q", routing.sup_q, "B", "N", "R")
    expect_shape(op, "routing.sup_k", routing.sup_k, "B", "M", "R")
    factors, _, limit = _numbers_of(routing)
    _check_factors(op, *routing.sup_q.shape[:2], routing.sup_k.shape[1], factors, limit)
    accumulate = accumulate_dtype(routing.sup_q.dtype)
    return reference.routing_bias((*(x.to(accumulate) for x in factors), *routing[6:])).to(routing.sup_q.dtype)


class _Call(NamedTuple):
    """The arguments of the op, but for its backend."""

    query: torch.Tensor  # [B, H, N, D]
    key: torch.Tensor  # [B, H, M, D]
    value: torch.Tensor  # [B, H, M, D]
    routing: list[torch.Tensor]
    """None, the six factors, or these and [2]: strength and limit, which then take the place of the numbers."""
    strength: float
    limit: float | None
    attn_mask: torch.Tensor | None
    key_ranges: torch.Tensor | None
    scale: float | None


def _numbers_of(routing: RoutingFactors | None) -> tuple[list[torch.Tensor], float, float | None]:
    """The factors, the strength and the limit; what is a tensor counts as 1 or as no limit."""
    if routing is None:
        return [], 1.0, None
    *factors, limit, strength = routing
    strength = 1.0 if isinstance(strength, torch.Tensor) else strength
    return factors, strength, None if isinstance(limit, torch.Tensor) else limit


def _packed(routing: RoutingFactors | None, query: torch.Tensor) -> tuple[list[torch.Tensor], float, float | None]:
    """The same, with one tensor of both more where one of them is a tensor."""
    factors, strength, limit = _numbers_of(routing)
    if routing is None or not (isinstance(routing.strength, torch.Tensor) or isinstance(routing.limit, torch.Tensor)):
        return factors, strength, limit
    dtype = accumulate_dtype(query.dtype)
    given = (routing.strength, math.inf if routing.limit is None else routing.limit)
    both = [x.to(dtype) if isinstance(x, torch.Tensor) else query.new_full((), x, dtype=dtype) for x in given]
    return [*factors, torch.stack(both)], 1.0, None


def check(call: _Call) -> None:
    """The contract, for real and fake tensors alike."""
    query, key, value, routing, _, limit, attn_mask, key_ranges, scale = call
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
    if routing:
        _check_factors(OP, batch, queries, keys, routing[:6], limit)
        expect_floating(OP, "routing.sup_q", routing[0], (query.dtype, accumulate_dtype(query.dtype)))
    if attn_mask is not None:
        _check_attn_mask(attn_mask, (batch, heads, queries, keys))
    if key_ranges is not None:
        if key_ranges.dim() == 4:
            expect_shape(OP, "key_ranges", key_ranges, ("B", batch), ("N", queries), ("", 2), ("", 2))
        else:
            expect_shape(OP, "key_ranges", key_ranges, ("N", queries), ("", 2), ("", 2))
        expect_floating(OP, "key_ranges", key_ranges, (torch.int32,))
    factors = dict(zip(_FACTORS, routing, strict=False))
    expect_same_device(
        OP, ("query", query), key=key, value=value, **factors, attn_mask=attn_mask, key_ranges=key_ranges
    )


def _expect_factors(op: str, routing: RoutingFactors) -> RoutingFactors:
    """`routing`, if it is made of tensors and its strength and limit are numbers or tensors of one."""
    expect_tensors(op, **dict(zip(_FACTORS, routing, strict=False)))
    *factors, limit, strength = routing
    limit = None if limit is None else number_or_tensor(op, "routing.limit", limit)
    strength = number_or_tensor(op, "routing.strength", strength, differentiable=True)
    for name, x in (("routing.limit", limit), ("routing.strength", strength)):
        if isinstance(x, torch.Tensor):
            expect_same_device(op, ("routing.sup_q", routing.sup_q), **{name: x})
    return RoutingFactors(*factors, limit, strength)


def _check_factors(op: str, b: int, n: int, m: int, factors: Sequence[torch.Tensor], limit: float | None) -> None:
    sup_q, sup_k, del_q, del_k, gate_q, gate_k = factors
    for name, factor in zip(_FACTORS, factors, strict=True):
        expect_floating(op, name, factor, (sup_q.dtype,))
    expect_shape(op, "routing.sup_q", sup_q, ("B", b), ("N", n), "R")
    expect_shape(op, "routing.sup_k", sup_k, ("B", b), ("M", m), ("R", sup_q.shape[2]))
    expect_shape(op, "routing.del_q", del_q, ("B", b), ("N", n), "R")
    expect_shape(op, "routing.del_k", del_k, ("B", b), ("M", m), ("R", del_q.shape[2]))
    expect_shape(op, "routing.gate_q", gate_q, ("B", b), ("N", n), "G")
    expect_shape(op, "routing.gate_k", gate_k, ("B", b), ("M", m), ("G", gate_q.shape[2]))
    if limit is not None and not limit >= 0:
        raise ValueError(f"{op}: routing.limit: expected a number >= 0 or None, got {limit}")


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


def _new_outputs(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """O [B, H, N, D], and lse [B, H, N] = log sum_j exp(S_hij), +inf where a query attends nothing.

    lse is a natural logarithm on every backend.
    """
    check(call)
    query = call.query
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))


def _new_grads(call: _Call, of_strength: bool) -> list[torch.Tensor]:
    """Gradients of query, key, value and factors, and rows [B, N] that sum to the strength's."""
    grads = [x.new_empty(x.shape) for x in (call.query, call.key, call.value, *call.routing[:6])]
    if of_strength and len(call.routing) > 6:
        grads.append(call.routing[6].new_empty(call.query.shape[0], call.query.shape[2]))
    return grads


def _kernel_inputs(call: _Call) -> tuple:
    """Inputs of the kernels: contiguous rows, masks as strided views over [B, H, N, M] and [B, N, 2, 2] (no copies)."""
    query, key, value, routing, strength, limit, attn_mask, key_ranges, scale = call
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if key_ranges is not None:
        key_ranges = key_ranges.contiguous().expand(query.shape[0], -1, -1, -1)
    scalars = (_scale(query, scale), strength, math.inf if limit is None else limit)
    qkv = [last_dim_contiguous(x) for x in (query, key, value)]
    return qkv, [last_dim_contiguous(x) for x in routing], attn_mask, key_ranges, scalars


def _kernel(*inputs):
    *inputs, backend = inputs
    call = _Call(*inputs)
    outputs = _new_outputs(call)
    backends.kernel(OP, "forward", backend)(*_kernel_inputs(call), outputs)
    return outputs


def _backward_kernel(grad_output, output, lse, *inputs):
    *inputs, of_strength, backend = inputs
    call = _Call(*inputs)
    grads = _new_grads(call, of_strength)
    run = backends.kernel(OP, "backward", backend)
    run(last_dim_contiguous(grad_output), [output, lse], *_kernel_inputs(call), grads)
    return grads


def _gradients(grads, given):
    routing = grads[3:9]
    if len(given["routing"]) > 6:
        sums = (grads[9].sum(), grads[9].new_zeros(())) if given["routing_grad"] else None
        routing = [*routing, None if sums is None else torch.stack(sums)]
    return {"query": grads[0], "key": grads[1], "value": grads[2], "routing": routing}


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor[] routing, float strength, float? limit, Tensor? attn_mask, "
    "Tensor? key_ranges, float? scale"
)

register(
    f"routed_attention({_INPUTS}, str backend) -> (Tensor output, Tensor lse)",
    _kernel,
    lambda *inputs: _new_outputs(_Call(*inputs[:-1])),
    Backward(
        f"routed_attention_backward(Tensor grad_output, Tensor output, Tensor lse, {_INPUTS}, bool routing_grad, "
        "str backend) -> Tensor[]",
        _backward_kernel,
        lambda *inputs: _new_grads(_Call(*inputs[3:-2]), inputs[-2]),
        _gradients,
    ),
)


def _flop(query, key, value, routing, *_, **__) -> int:
    """q k and P v of every head; the products of ranks and the gate once for all heads."""
    batch, heads, queries, channels = query
    ranks = sum(factor[-1] for factor in routing[:6:2])
    return 2 * batch * queries * key[2] * (2 * heads * channels + ranks)


def _backward_flop(grad_output, output, lse, query, key, value, routing, *_, **__) -> int:
    """S again, dP, dV, dK and dQ of every head; each product of ranks again, and its two gradients."""
    batch, heads, queries, channels = query
    ranks = sum(factor[-1] for factor in routing[:6:2])
    return 2 * batch * queries * key[2] * (5 * heads * channels + 3 * ranks)


count_flop(OP, _flop, _backward_flop)


def _backward_workspace(grad_output, output, lse, query, key, value, routing, strength, limit, attn_mask, *_) -> int:
    """dO . O, with a float mask maxima and sums of rows, and what groups of heads add to three factors' gradients: at
    most a group for every head."""
    of_queries, of_keys = (sum(factor.numel() for factor in routing[side:6:2]) for side in (0, 1))
    of_rows = 3 if attn_mask is not None and attn_mask.dtype != torch.bool else 1
    return 4 * (of_rows * lse.numel() + query.shape[1] * max(of_queries, of_keys))


count_workspace(f"{OP}_backward", _backward_workspace)
