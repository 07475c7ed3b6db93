"""Deformable attention (arXiv 2010.04159) as `grid_sample` level by level, as public modules do without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def ms_deform_attn(
    value: torch.Tensor,  # [B, S, H, D]
    shapes: Sequence[tuple[int, int]],
    starts: Sequence[int],
    sampling_locations: torch.Tensor,  # [B, N, H, L, P, 2], or [B, N, H, K, 2] with points
    attention_weights: torch.Tensor,  # [B, N, H, L, P], or [B, N, H, K] with points
    points: Sequence[int] | None = None,  # of each level
) -> torch.Tensor:
    """sum over levels and points of weight times the bilinear sample: [B, N, H * D]."""
    if points is None:
        return sampled(value, shapes, starts, sampling_locations.unbind(3), attention_weights.unbind(3))
    return sampled(value, shapes, starts, sampling_locations.split(points, 3), attention_weights.split(points, 3))


def sampled(
    value: torch.Tensor,  # [B, S, H, D]
    shapes: Sequence[tuple[int, int]],
    starts: Sequence[int],
    locations: Sequence[torch.Tensor],  # [B, N, H, P, 2] of each level
    weights: Sequence[torch.Tensor],  # [B, N, H, P] of each level
) -> torch.Tensor:
    batch, _, heads, channels = value.shape
    queries = weights[0].shape[1] if weights else 0
    output = value.new_zeros(batch * heads, channels, queries)
    for (height, width), start, location, weight in zip(shapes, starts, locations, weights, strict=True):
        if height * width == 0:  # grid_sample takes no empty level
            continue
        level = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        dtype = torch.promote_types(level.dtype, location.dtype)  # as autocast does for grid_sample
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1)  # [B H, N, P, 2]
        sampled = F.grid_sample(
            level.to(dtype), grid.to(dtype), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        weight = weight.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [B H, 1, N, P]
        output = output + (sampled * weight.to(dtype)).sum(dim=-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)
