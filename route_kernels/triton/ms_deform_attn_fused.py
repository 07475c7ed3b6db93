"""Fused deformable attention in Triton: the launches of `ms_deform_attn` with points of the form offset and logit.

The softmax and the locations are in registers; what backward needs of them is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..precision import accumulate_dtype
from .block_sizes import config
from .launch import Grid, blocks, kept, power_of_two
from .ms_deform_attn.backward import softmax_adjoint
from .ms_deform_attn.host import Points, backward_grid, sample, sample_backward


def forward(value, levels, reference_points, offsets, logits, value_mask, output) -> None:
    """Fills output [B, N, H * D] of value [B, S, H, D], offsets [B, N, H, K, 2] and logits [B, N, H, K]."""
    sample(value, Points(offsets, logits, reference_points, value_mask, tuple(levels)), output)


def backward(
    grad_output, value, levels, reference_points, offsets, logits, value_mask, deterministic, grads
) -> None:  # fmt: skip
    """Fills the gradients of value, offsets, logits and, where there is a fourth, reference points."""
    points = Points(offsets, logits, reference_points, value_mask, tuple(levels))
    grad_value, grad_offsets, grad_logits, *grad_reference = grads
    accumulate = accumulate_dtype(value.dtype)
    grad_weights = grad_logits if logits.dtype == accumulate else torch.empty_like(grad_logits, dtype=accumulate)
    of_heads = None
    if grad_reference:
        batch, queries, heads, _ = logits.shape
        count, of_levels, coordinates = len(points.counts), reference_points.shape[2], reference_points.shape[3]
        summed = (heads * count, 1) if of_levels == 1 else (heads, count)
        shape = (batch, queries, *summed, coordinates)
        of_heads = torch.empty(shape, dtype=accumulate, device=value.device)
    samples, softmax = kept(_grids, (grad_output, value, *points.tensors()), points.levels)
    parts = (grad_value, grad_offsets, grad_weights, of_heads)
    sample_backward(samples, grad_output, value, points, parts, deterministic)
    softmax_adjoint[softmax](grad_logits, grad_weights, logits)
    if of_heads is not None:
        grad_reference[0].copy_(of_heads.sum(dim=2))


def _grids(tensors: Sequence[torch.Tensor | None], levels: tuple[int, ...]) -> tuple[Grid, Grid]:
    return backward_grid(tensors, levels), softmax_grid(tensors[3], accumulate_dtype(tensors[1].dtype))


def softmax_grid(logits: torch.Tensor, accumulate: torch.dtype) -> Grid:
    """The grid of `softmax_adjoint`, for logits [B, N, H, K]."""
    batch, queries, heads, samples = logits.shape
    rows, block_k = batch * queries * heads, min(power_of_two(samples), 128)
    settings = dict(config("softmax_adjoint", logits.device, accumulate))
    block_n = max(settings.pop("BLOCK_NK") // block_k, 1)
    return Grid(
        (blocks(rows, block_n),), rows, queries, heads, samples, *logits.stride()[:3],
        BLOCK_N=block_n, BLOCK_K=block_k, **settings,
    )  # fmt: skip
