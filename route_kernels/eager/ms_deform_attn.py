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
        return _sampled(value, shapes, starts, sampling_locations.unbind(3), attention_weights.unbind(3))
    return _sampled(value, shapes, starts, sampling_locations.split(points, 3), attention_weights.split(points, 3))


def ms_deform_attn_fused(
    value: torch.Tensor,  # [B, S, H, D]
    shapes: Sequence[tuple[int, int]],
    starts: Sequence[int],
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    sampling_offsets: torch.Tensor,  # [B, N, H, K, 2]
    attention_logits: torch.Tensor,  # [B, N, H, K]
    points: Sequence[int],
    value_mask: torch.Tensor | None,  # [B, S] bool, True counts as zero
) -> torch.Tensor:
    """Softmax, location arithmetic and `grid_sample`, one after the other: [B, N, H * D]."""
    if value_mask is not None:
        value = value.masked_fill(value_mask[:, :, None, None], 0)
    weights = attention_logits.softmax(dim=-1).split(points, dim=3)
    return _sampled(value, shapes, starts, locations(shapes, reference_points, sampling_offsets, points), weights)


def locations(
    shapes: Sequence[tuple[int, int]],
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    sampling_offsets: torch.Tensor,  # [B, N, H, K, 2]
    points: Sequence[int],
) -> list[torch.Tensor]:
    """reference + offset / (w, h), or reference + offset / P (w, h) / 2 of a box: [B, N, H, P, 2] of each level."""
    references = reference_points.expand(-1, -1, len(shapes), -1).unbind(2)
    located = []
    for (height, width), count, reference, offsets in zip(
        shapes, points, references, sampling_offsets.split(points, dim=3), strict=True
    ):
        reference = reference[:, :, None, None]
        if reference.shape[-1] == 2:
            x, y = offsets.unbind(-1)
            located.append(reference + torch.stack([x / max(width, 1), y / max(height, 1)], dim=-1))
        else:
            located.append(reference[..., :2] + offsets / count * reference[..., 2:] * 0.5)
    return located


def _sampled(
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
