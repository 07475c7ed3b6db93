"""What our ops' kernels allocate inside, in bytes, beside the outputs that their fakes show.

Ops that return their workspace as an output need no entry here: the ledger sees it. The formulas are those of the
launches in `route_kernels.triton`; a test compares them with what the launches ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from route_kernels.ops.levels import level_count
from route_kernels.precision import accumulate_dtype


def workspace_bytes(op: Any, arguments: Sequence[Any], backend: str) -> int:
    """Bytes that `backend` allocates inside one call of `op` (an overload such as `torch.ops.aten.mm.default`).

    arguments: positional, as a dispatch mode gets them. 0 for ops that are not ours.
    """
    if getattr(op, "namespace", None) != "route_kernels":
        return 0
    formula = _FORMULAS.get((op._schema.name.partition("::")[2], backend))
    return 0 if formula is None else formula(*arguments)


def _bytes(count: int, dtype: torch.dtype) -> int:
    return count * dtype.itemsize


def _sums(value: torch.Tensor) -> int:
    """Of the gradient of value [B, S, H, D], where it is not added to in its own dtype."""
    accumulate = accumulate_dtype(value.dtype)
    return 0 if value.dtype == accumulate else _bytes(value.numel(), accumulate)


def _ms_deform_attn_backward(grad_output, value, *_) -> int:
    return _sums(value)


def _ms_deform_attn_fused_backward(
    grad_output, value, sizes, reference_points, offsets, logits, points, value_mask, reference_grad, *_
) -> int:
    accumulate = accumulate_dtype(value.dtype)
    weights = 0 if logits.dtype == accumulate else _bytes(logits.numel(), accumulate)
    levels, coordinates = level_count(sizes), reference_points.shape[3]
    of_heads = _bytes(logits.shape[:3].numel() * levels * coordinates, accumulate) if reference_grad else 0
    return _sums(value) + weights + of_heads


def _routed_attention_backward(grad_output, output, lse, query, key, value, routing, *others) -> int:
    """dO . O, with a float mask maxima and sums of rows, and what groups of heads add to three factors' gradients: at
    most a group for every head."""
    of_queries, of_keys = (sum(factor.numel() for factor in routing[side:6:2]) for side in (0, 1))
    _strength, _limit, attn_mask, *_ = others
    of_rows = 3 if attn_mask is not None and attn_mask.dtype != torch.bool else 1
    return _bytes(of_rows * lse.numel() + query.shape[1] * max(of_queries, of_keys), torch.float32)


def _query_similarity(x, *_) -> int:
    return _bytes(x.shape[0] * x.shape[1], torch.float32)  # 1 / |x|


_FORMULAS: dict[tuple[str, str], Callable[..., int]] = {
    ("ms_deform_attn_backward", "triton"): _ms_deform_attn_backward,
    ("ms_deform_attn_fused_backward", "triton"): _ms_deform_attn_fused_backward,
    ("routed_attention_backward", "triton"): _routed_attention_backward,
    ("query_similarity", "triton"): _query_similarity,
}
