"""Deformable attention by Triton, with the signatures of the native kernels' calls in `ops/ms_deform_attn.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .launch import kept
from .ms_deform_attn_arguments import Points
from .ms_deform_attn_launch import prepared_backward, sample, sample_backward

if TYPE_CHECKING:
    from .variants import Variant

SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
"""The levels of a detector's image of 800 x 1333 pixels."""


def forward(value, spatial_shapes, starts, locations, weights, counts):
    """[B, N, H * D] of value [B, S, H, D], locations [B, N, H, K, 2] and weights [B, N, H, K]."""
    return sample(value, Points(locations, weights, None, None, spatial_shapes, starts, counts))


def backward(grad_output, value, spatial_shapes, starts, locations, weights, counts, *grads) -> None:
    """Writes the gradients of value, locations and weights."""
    points = Points(locations, weights, None, None, spatial_shapes, starts, counts)
    _backward(grad_output, value, points, *grads)


def _backward(grad_output, value, points: Points, *grads: torch.Tensor, deterministic: bool | None = None) -> None:
    prepared = kept(prepared_backward, (grad_output, value, *points.tensors()), *points.shape())
    sample_backward(prepared, grad_output, value, points, *grads, deterministic=deterministic)


def variants(architecture: str) -> Iterator[Variant]:
    """A detector's encoder for every dtype, with both ways to sum the gradient of value, and D of no power of two."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield from _variants(architecture, dtype, channels=32)
    yield from _variants(architecture, torch.bfloat16, channels=24)


def _variants(architecture: str, dtype: torch.dtype, channels: int) -> Iterator[Variant]:
    from .variants import recorded

    heads, point_dtype = 8, torch.promote_types(dtype, torch.float32)
    positions = sum(height * width for height, width in SHAPES)
    counts = (4,) * len(SHAPES)

    def empty(*shape: int, dtype: torch.dtype = point_dtype) -> torch.Tensor:
        return torch.empty(1, positions, heads, *shape, dtype=dtype, device="meta")

    value, locations, weights = empty(channels, dtype=dtype), empty(sum(counts), 2), empty(sum(counts))
    sizes = [size for pair in SHAPES for size in pair]
    points = Points(locations, weights, None, None, sizes, (0,) * len(SHAPES), counts)
    label = f"{str(dtype).removeprefix('torch.')} D={channels}"
    yield from recorded("ms_deform_attn", "forward", label, architecture, lambda: sample(value, points))
    for way, deterministic in (("", False), (" deterministic", True)):
        yield from recorded(
            "ms_deform_attn", "backward", label + way, architecture,
            lambda deterministic=deterministic: _backward(
                value.flatten(2), value, points, value, locations, weights, deterministic=deterministic
            ),
        )  # fmt: skip
