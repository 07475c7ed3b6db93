"""Routed attention in Triton: launches of the forward kernel and of the two passes of backward.

Called by `route_kernels.ops.routed_attention` with masks as views of [B, H, N, M] and [B, N, 2, 2], checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import block_sizes
from ..block_sizes import AMD, HALF
from ..launch import Grid, blocks, contiguous_like, input_precision, kept, padded
from .backward import attention_backward_keys, attention_backward_queries, sum_groups
from .forward import attention_forward
from .tile import BOOL_MASK, FLOAT_MASK, LOG2_E, NO_MASK

SUM_BLOCK = 1024
MOST_GATE_COLUMNS = 4  # of a gate in multiply-adds

Inputs = Sequence[torch.Tensor | None]  # query, key, value, six factors, controls, mask, ranges


def forward(qkv, routing, attn_mask, key_ranges, scalars, outputs) -> None:
    """Fills output [B, H, N, D] and lse [B, H, N] float32, a natural logarithm, +inf where a query attends nothing.

    routing: nothing, six factors, or these and [2] = (strength, limit); scalars: scale, strength, limit.
    """
    if qkv[0].shape[1] == 0:
        return
    inputs = _inputs(qkv, routing, attn_mask, key_ranges)
    grid = kept(_forward, inputs, input_precision(), False)
    attention_forward[grid](*inputs, *outputs, None, *_floats(scalars))


def backward(grad_output, outputs, qkv, routing, attn_mask, key_ranges, scalars, grads) -> None:
    """Fills the gradients of query, key, value, of six factors where there are some, and the rows [B, N] of strength's.

    The same bits every time. The pass over queries comes first: it writes T = dO . O, which the pass over keys reads.
    """
    if 0 in qkv[0].shape[:2]:  # no head: no program writes the factors' gradients
        for grad in grads:
            grad.zero_()
        return
    inputs, floats = _inputs(qkv, routing, attn_mask, key_ranges), _floats(scalars)
    grad_query, grad_key, grad_value, *of_factors = grads
    of_factors, of_strength = of_factors[:6], of_factors[6] if len(of_factors) > 6 else None
    output, lse = (x.contiguous() for x in outputs)
    output_dot = contiguous_like(lse)
    of_queries, of_keys = kept(_backward, (grad_output, *inputs), input_precision())
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        statistics = lse.new_empty((*lse.shape, 2))
        attention_forward[kept(_forward, inputs, input_precision(), True)](*inputs, None, lse, statistics, *floats)
        lse = statistics

    parts = of_queries.parts(of_factors[::2])
    rows = of_strength
    if rows is not None and of_queries.groups > 1:
        rows = rows.new_empty((of_queries.groups, *rows.shape))
    attention_backward_queries[of_queries.grid](
        grad_output, output, lse, *inputs, grad_query, *parts, output_dot, rows, *floats
    )
    of_queries.sum(parts, of_factors[::2])
    if rows is not of_strength:
        torch.sum(rows, 0, out=of_strength)
    del parts, rows  # before there are others
    parts = of_keys.parts(of_factors[1::2])
    attention_backward_keys[of_keys.grid](
        grad_output, output_dot, lse, *inputs, grad_key, grad_value, *parts, *floats
    )  # fmt: skip
    of_keys.sum(parts, of_factors[1::2])


def _inputs(qkv, routing, attn_mask, key_ranges) -> Inputs:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.view(torch.uint8)
    return *qkv, *routing, *(None,) * (7 - len(routing)), attn_mask, key_ranges


def _floats(scalars: Sequence[float]) -> tuple[float, float | None, float]:
    """Scale, strength, limit; None is a strength of 1, for which a kernel multiplies nothing."""
    scale, strength, limit = scalars
    return scale, None if strength == 1.0 else strength, limit


def _forward(inputs: Inputs, precision: str, statistics: bool) -> Grid:
    query, key = inputs[:2]
    constants = _constants("routed_attention_forward", inputs, precision)
    programs, sizes = _programs(query, query.shape[2], constants, "BLOCK_N"), (*query.shape[1:3], key.shape[2])
    return Grid(programs, *sizes, *_strides(inputs), STATISTICS=statistics, **constants)


class _Pass(NamedTuple):
    """A pass of backward: over queries, or over keys."""

    grid: Grid
    groups: int  # of heads: each writes its part of the three factors' gradients
    total: Grid | None  # of `sum_groups`, which adds the parts; None where there is one, or no factor

    def parts(self, grads: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        """Where the three gradients are written: in place, or [groups, ...] for `sum` to add."""
        if self.total is None:
            return grads or (None, None, None)
        return [grad.new_empty((self.groups, *grad.shape), dtype=torch.float32) for grad in grads]

    def sum(self, parts: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor]) -> None:
        if self.total is not None:
            sum_groups[self.total](*parts, *grads)


def _backward(inputs: Inputs, precision: str) -> tuple[_Pass, _Pass]:
    grad_output, query, key = inputs[:3]
    integers = (*query.shape[:3], key.shape[2], grad_output.stride()[:3], *_strides(inputs[1:]))

    def over(kernel_name: str, rows: int, block: str, factors: Sequence[torch.Tensor | None]) -> _Pass:
        constants = _constants(kernel_name, inputs[1:], precision)
        grid = Grid(_programs(query, rows, constants, block), *integers, **constants)
        groups = blocks(query.shape[1], constants["HEADS_PER_PROGRAM"])
        if groups == 1 or factors[0] is None:
            return _Pass(grid, groups, None)
        elements = [factor.numel() for factor in factors]
        programs = (blocks(max(elements), SUM_BLOCK), 3)
        return _Pass(grid, groups, Grid(programs, groups, *elements, BLOCK=SUM_BLOCK, num_warps=4))

    return (
        over("routed_attention_backward_queries", query.shape[2], "BLOCK_N", inputs[4:10:2]),
        over("routed_attention_backward_keys", key.shape[2], "BLOCK_M", inputs[5:10:2]),
    )


def _programs(query: torch.Tensor, rows: int, constants: dict[str, Any], block: str) -> tuple[int]:
    """Blocks of rows, groups of heads, images; neighbours share an image's keys."""
    groups = blocks(query.shape[1], constants["HEADS_PER_PROGRAM"])
    return (blocks(rows, constants[block]) * groups * query.shape[0],)


def _strides(inputs: Inputs) -> tuple[int | tuple[int, ...], ...]:
    """Strides of query, key, value; of the factors of queries, and of keys; of mask and ranges; 0 for no tensor."""
    *attended, sup_q, sup_k, del_q, del_k, gate_q, gate_k, _, attn_mask, key_ranges = inputs

    def of(tensors: Sequence[torch.Tensor | None], count: int) -> tuple[int, ...]:
        return tuple(s for x in tensors for s in ((0,) * count if x is None else x.stride()[:count]))

    return (
        *(x.stride()[:3] for x in attended), of((sup_q, del_q, gate_q), 2), of((sup_k, del_k, gate_k), 2),
        of((attn_mask,), 4), *of((key_ranges,), 1),
    )  # fmt: skip


def _constants(kernel_name: str, inputs: Inputs, precision: str) -> dict[str, Any]:
    """The constants that a kernel is compiled for, and its settings of the table, with the heads spread evenly:
    5 heads in groups of at most 4 are 3 and 2."""
    query, key, _, *factors, _, attn_mask, key_ranges = inputs
    _, heads, queries, channels = query.shape
    routed, factor_dtype = factors[0] is not None, query.dtype if factors[0] is None else factors[0].dtype
    ranks = tuple(factor.shape[-1] if routed else 0 for factor in factors[::2])
    settings = block_sizes.config(
        kernel_name, query.device, query.dtype, H=heads, N=queries, M=key.shape[2], D=channels,
        R=max(ranks), MASKED=1 if attn_mask is None and key_ranges is None else 2,
        F=factor_dtype.itemsize,
    )  # fmt: skip
    mask_kind = NO_MASK
    if attn_mask is not None:
        mask_kind = BOOL_MASK if attn_mask.dtype == torch.uint8 else FLOAT_MASK
    target = block_sizes.architecture(query.device)
    # TF32 factors beside a short query are more exact than the logits they add to.
    factor_precision = "tf32" if query.dtype != factor_dtype else precision
    multiplied = factor_dtype == torch.float32 and factor_precision == "ieee" and target not in AMD
    return dict(
        ROUTED=routed, MASK=mask_kind,
        MASK_OF_HEAD=attn_mask is not None and heads > 1 and attn_mask.stride(1) != 0, RANGES=key_ranges is not None,
        D=channels, RANKS=ranks, BLOCK_D=padded(channels), PADDED_RANKS=tuple(map(padded, ranks)),
        # Where `dot` has no tensor cores it would multiply the 16 columns that it pads to: see docs/triton.md.
        GATE_COLUMNS=ranks[2] if multiplied and ranks[2] <= MOST_GATE_COLUMNS else 0,
        PRECISION=precision, FACTOR_PRECISION=factor_precision,
        FAST_SIGMOID=query.dtype in HALF and target.startswith("sm"), UNITS=LOG2_E if query.dtype in HALF else 1.0,
        **{**settings, "HEADS_PER_PROGRAM": blocks(heads, blocks(heads, settings["HEADS_PER_PROGRAM"]))},
    )  # fmt: skip
