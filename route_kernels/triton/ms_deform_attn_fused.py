"""Fused deformable attention by Triton, with the signatures of the native kernels' calls in its file of `ops/`.

The softmax and the locations are in registers; what backward needs of them is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..reference.precision import accumulate_dtype
from .launch import Prepared, config, contiguous_like, kept
from .ms_deform_attn_arguments import Points, power_of_two
from .ms_deform_attn_launch import prepared_backward, sample, sample_backward
from .softmax_adjoint import softmax_adjoint

if TYPE_CHECKING:
    from .variants import Variant


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


def variants(architecture: str) -> Iterator[Variant]:
    """A detector's decoder for every dtype: boxes of each level, a mask, every gradient; with points, neither."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield from _variants(architecture, dtype, coordinates=4, masked=True)
    yield from _variants(architecture, torch.bfloat16, coordinates=2, masked=False)


def _variants(architecture: str, dtype: torch.dtype, coordinates: int, masked: bool) -> Iterator[Variant]:
    from .variants import recorded

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
    yield from recorded("ms_deform_attn_fused", "forward", label, architecture, lambda: forward(*inputs))
    yield from recorded(
        "ms_deform_attn_fused", "backward", label, architecture, lambda: backward(grad_output, *inputs, masked)
    )
