"""Softmax, location arithmetic and `grid_sample`, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .ms_deform_attn import sampled


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
    return sampled(value, shapes, starts, locations(shapes, reference_points, sampling_offsets, points), weights)


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
