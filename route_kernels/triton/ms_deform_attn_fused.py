"""Fused deformable attention by Triton, with the signatures of the native kernels' calls in its file of `ops/`.

The softmax and the locations are in registers; what backward needs of them is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..precision import accumulate_dtype
from .launch import Prepared, config, contiguous_like, kept
from .ms_deform_attn.backward import softmax_adjoint
from .ms_deform_attn.host import Points, power_of_two, prepared_backward, sample, sample_backward


def forward(value, spatial_shapes, starts, reference_points, offsets, logits, counts, value_mask):
    """[B, N, H * D] of value [B, S, H, D], offsets [B, N, H, K, 2] and logits [B, N, H, K]."""
    return sample(value, Points(offsets, logits, reference_points, value_mask, spatial_shapes, starts, counts))


def backward(
    grad_output, value, spatial_shapes, starts, reference_points, offsets, logits, counts, value_mask, reference_grad
) -> list[torch.Tensor]:
    """The gradients of value, offsets, logits and, with `reference_grad`, reference points."""
    points = Points(offsets, logits, reference_points, value_mask, spatial_shapes, starts, counts)
    grad_value, grad_offsets, grad_logits = map(contiguous_like, (value, offsets, logits))
    accumulate = accumulate_dtype(value.dtype)
    grad_weights = grad_logits if logits.dtype == accumulate else torch.empty_like(grad_logits, dtype=accumulate)
    of_heads = None
    if reference_grad:
        batch, queries, heads, _ = logits.shape
        summed, levels = (heads * len(counts), 1) if reference_points.shape[2] == 1 else (heads, len(counts))
        shape = (batch, queries, summed, levels, reference_points.shape[3])
        of_heads = torch.empty(shape, dtype=accumulate, device=value.device)
    samples, softmax = kept(_backward, (grad_output, value, *points.tensors()), *points.shape())
    sample_backward(samples, grad_output, value, points, grad_value, grad_offsets, grad_weights, of_heads)
    softmax((grad_logits, grad_weights, logits))
    grads = [grad_value, grad_offsets, grad_logits]
    if of_heads is not None:
        grads.append(of_heads.sum(dim=2).to(reference_points.dtype))
    return grads


def _backward(tensors: Sequence[torch.Tensor | None], *shape: tuple[int, ...]) -> tuple[Prepared, Prepared]:
    return prepared_backward(tensors, *shape), _softmax_backward(tensors[3], accumulate_dtype(tensors[1].dtype))


def _softmax_backward(logits: torch.Tensor, accumulate: torch.dtype) -> Prepared:
    """From the gradient of the softmax of logits [B, N, H, K] to theirs, which may be the same tensor."""
    batch, queries, heads, samples = logits.shape
    rows, block_k = batch * queries * heads, min(power_of_two(samples), 128)
    settings = dict(config("softmax_adjoint", logits.device, accumulate))
    block_n = max(settings.pop("BLOCK_NK") // block_k, 1)
    return Prepared(
        softmax_adjoint, (-(-rows // block_n),), rows, queries, heads, samples, *logits.stride()[:3],
        BLOCK_N=block_n, BLOCK_K=block_k, **settings,
    )  # fmt: skip
