"""Routed attention in Triton: launches of the forward kernel and of the two passes of backward.

Called by `route_kernels.ops.routed_attention` with masks as views of [B, H, N, M] and [B, N, 2, 2], checked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import launch
from ..block_sizes import AMD, HALF
from .backward import attention_backward_keys, attention_backward_queries, sum_groups
from .forward import attention_forward
from .tile import BOOL_MASK, FLOAT_MASK, LOG2_E, NO_MASK

if TYPE_CHECKING:
    from collections.abc import Sequence

SUM_BLOCK = 1024
MOST_GATE_COLUMNS = 4  # of a gate in multiply-adds
STRIDES = (3, 3, 3, *(2,) * 6, 4, 1)  # of query, key, value, factors, mask and ranges that are no constants


def forward(query, key, value, factors, limit, attn_mask, key_ranges, scale):
    """O [B, H, N, D] and lse [B, H, N] float32, +inf where a query attends nothing."""
    output = launch.contiguous_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if query.shape[1] == 0:
        return output, lse
    inputs = (query, key, value, *factors, _bytes(attn_mask), key_ranges)
    launched = launch.kept(_forward, inputs, launch.input_precision(), False)
    launched((*inputs, output, lse, None), scale, _bound(limit))
    return output, lse


def backward(grad_output, output, lse, query, key, value, factors, limit, attn_mask, key_ranges, scale):
    """Gradients of query, key, value and, where there are factors, of the six: the same bits every time.

    The pass over queries comes first: it writes T = dO . O, which the pass over keys reads.
    """
    grads = [launch.contiguous_like(x) for x in (query, key, value, *factors) if x is not None]
    if 0 in query.shape[:2]:  # no head: no program writes the factors' gradients
        return [grad.zero_() for grad in grads]
    output_dot = launch.contiguous_like(lse)
    output, lse, floats = output.contiguous(), lse.contiguous(), (scale, _bound(limit))
    inputs = (query, key, value, *factors, _bytes(attn_mask), key_ranges)
    of_queries, of_keys = launch.kept(_backward, (grad_output, *inputs), launch.input_precision())
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        statistics = lse.new_empty((*lse.shape, 2))
        launch.kept(_forward, inputs, launch.input_precision(), True)((*inputs, None, lse, statistics), *floats)
        lse = statistics

    parts = of_queries.parts(grads[3::2])
    of_queries.launch((grad_output, output, lse, *inputs, grads[0], *parts, output_dot), *floats)
    of_queries.sum(parts, grads[3::2])
    del parts  # before there are others
    parts = of_keys.parts(grads[4::2])
    of_keys.launch((grad_output, output_dot, lse, *inputs, grads[1], grads[2], *parts), *floats)
    of_keys.sum(parts, grads[4::2])
    return grads


def _forward(inputs, precision: str, statistics: bool) -> launch.Prepared:
    query, key = inputs[:2]
    settings = _settings("routed_attention_forward", inputs, precision)
    grid, sizes = _grid(query, query.shape[2], settings, "BLOCK_N"), (query.shape[1], query.shape[2], key.shape[2])
    return launch.Prepared(attention_forward, grid, *sizes, *_strides(inputs), STATISTICS=statistics, **settings)


class _Pass(NamedTuple):
    """Of backward: over queries, or over keys."""

    launch: launch.Prepared
    groups: int  # of heads: each writes its part of the three factors' gradients
    total: launch.Prepared | None  # adds the parts; None where there is one, or no factor

    def parts(self, grads: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        """Where the three gradients are written: in place, or [groups, ...] for `sum` to add."""
        if self.total is None:
            return grads or (None, None, None)
        return [grad.new_empty((self.groups, *grad.shape), dtype=torch.float32) for grad in grads]

    def sum(self, parts: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor]) -> None:
        if self.total is not None:
            self.total((*parts, *grads))


def _backward(inputs, precision: str) -> tuple[_Pass, _Pass]:
    grad_output, query, key = inputs[:3]
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    integers = (*sizes, *grad_output.stride()[:3], *_strides(inputs[1:]))

    def over(kernel, kernel_name: str, rows: int, block: str, factors) -> _Pass:
        settings = _settings(kernel_name, inputs[1:], precision)
        of_rows = launch.Prepared(kernel, _grid(query, rows, settings, block), *integers, **settings)
        groups = launch.blocks(query.shape[1], settings["HEADS_PER_PROGRAM"])
        if groups == 1 or factors[0] is None:
            return _Pass(of_rows, groups, None)
        elements = [factor.numel() for factor in factors]
        grid = (launch.blocks(max(elements), SUM_BLOCK), 3)
        return _Pass(
            of_rows, groups, launch.Prepared(sum_groups, grid, groups, *elements, BLOCK=SUM_BLOCK, num_warps=4)
        )

    return (
        over(
            attention_backward_queries, "routed_attention_backward_queries", query.shape[2], "BLOCK_N", inputs[4:10:2]
        ),
        over(attention_backward_keys, "routed_attention_backward_keys", key.shape[2], "BLOCK_M", inputs[5:10:2]),
    )


def _bytes(attn_mask: torch.Tensor | None) -> torch.Tensor | None:
    return attn_mask.view(torch.uint8) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask


def _grid(query, rows: int, settings, block: str) -> tuple[int]:
    """Programs: blocks of rows, groups of heads, images; neighbours share an image's keys."""
    groups = launch.blocks(query.shape[1], settings["HEADS_PER_PROGRAM"])
    return (launch.blocks(rows, settings[block]) * groups * query.shape[0],)


def _strides(inputs) -> list[int]:
    strides: list[int] = []
    for tensor, count in zip(inputs, STRIDES, strict=True):
        strides += (0,) * count if tensor is None else tensor.stride()[:count]
    return strides


def _settings(kernel_name: str, inputs, precision: str) -> dict[str, Any]:
    """The table's, with the heads spread evenly over the programs: 5 heads in groups of at most 4 are 3 and 2; and what
    the kernel is compiled for."""
    query, key, _, *factors, attn_mask, key_ranges = inputs
    _, heads, queries, channels = query.shape
    routed, masked = factors[0] is not None, attn_mask is not None or key_ranges is not None
    settings = launch.config(
        kernel_name, query.device, query.dtype, H=heads, N=queries, M=key.shape[2], D=channels,
        R=max(factor.shape[-1] for factor in factors) if routed else 0, MASKED=2 if masked else 1,
        F=factors[0].element_size() if routed else query.element_size(),
    )  # fmt: skip
    groups = launch.blocks(heads, settings["HEADS_PER_PROGRAM"])
    mask_kind = NO_MASK
    if attn_mask is not None:
        mask_kind = BOOL_MASK if attn_mask.dtype == torch.uint8 else FLOAT_MASK
    constants = _constants(
        query.dtype, channels, tuple(factor.shape[-1] for factor in factors[::2]) if routed else None,
        factors[0].dtype if routed else query.dtype, mask_kind,
        attn_mask is not None and heads > 1 and attn_mask.stride(1) != 0, key_ranges is not None,
        precision, launch.target(query.device),
    )  # fmt: skip
    return {**constants, **settings, "HEADS_PER_PROGRAM": launch.blocks(heads, groups)}


def _constants(
    dtype: torch.dtype, channels: int, ranks: tuple[int, ...] | None, factor_dtype: torch.dtype, mask_kind: int,
    mask_of_head: bool, ranges: bool, precision: str, target: str,
) -> dict[str, object]:  # fmt: skip
    """What the kernels are compiled for."""
    sup_rank, del_rank, gate_rank = ranks or (0, 0, 0)
    # TF32 factors beside a short query are more exact than the logits they add to.
    factor_precision = "tf32" if dtype != factor_dtype else precision
    multiplied = factor_dtype == torch.float32 and factor_precision == "ieee" and target not in AMD
    return dict(
        ROUTED=ranks is not None, MASK=mask_kind, MASK_OF_HEAD=mask_of_head, RANGES=ranges,
        D=channels, SUP_RANK=sup_rank, DEL_RANK=del_rank, GATE_RANK=gate_rank,
        BLOCK_D=launch.padded(channels), BLOCK_SUP=launch.padded(sup_rank), BLOCK_DEL=launch.padded(del_rank),
        BLOCK_GATE=launch.padded(gate_rank),
        # Where `dot` has no tensor cores it would multiply the 16 columns that it pads to: see docs/triton.md.
        GATE_COLUMNS=gate_rank if multiplied and gate_rank <= MOST_GATE_COLUMNS else 0,
        PRECISION=precision, FACTOR_PRECISION=factor_precision,
        FAST_SIGMOID=dtype in HALF and target.startswith("sm"), UNITS=LOG2_E if dtype in HALF else 1.0,
    )  # fmt: skip


def _bound(limit: float | None) -> float:
    return math.inf if limit is None else limit
