"""Deformable attention from raw offsets and logits: softmax, locations, then `ms_deform_attn`."""

from __future__ import annotations

import torch

from ..precision import accumulate_dtype
from .ms_deform_attn import attend


def ms_deform_attn_fused(
    value: torch.Tensor,  # [B, S, H, D]
    shapes: tuple[tuple[int, int], ...],
    starts: tuple[int, ...],
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    sampling_offsets: torch.Tensor,  # [B, N, H, K, 2]
    attention_logits: torch.Tensor,  # [B, N, H, K]
    points: tuple[int, ...],
    value_mask: torch.Tensor | None,  # [B, S] bool, True counts as zero
) -> torch.Tensor:
    """Softmax over all K points, locations from offsets, gather and weighted sum: [B, N, H * D]."""
    dtype, accumulate = value.dtype, accumulate_dtype(value.dtype)
    value = value.to(accumulate)
    if value_mask is not None:
        value = value.masked_fill(value_mask[:, :, None, None], 0)
    logits = attention_logits.to(accumulate)
    no_weight = (logits == -torch.inf).all(dim=-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(no_weight, 0), dim=-1).masked_fill(no_weight, 0)
    locations = _locations(reference_points.to(accumulate), sampling_offsets.to(accumulate), shapes, points)
    return attend(value, shapes, starts, points, locations, weights).to(dtype)


def _locations(
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    offsets: torch.Tensor,  # [B, N, H, K, 2]
    shapes: tuple[tuple[int, int], ...],
    points: tuple[int, ...],
) -> torch.Tensor:
    """Reference point plus scaled offset, NaN (a sample that is nowhere) where not finite: [B, N, H, K, 2]."""
    references = reference_points.expand(-1, -1, len(shapes), -1)
    located = [] if shapes else [offsets + reference_points[:, :, :0].sum()]  # no level: K = 0, yet differentiable
    for level, (size, offset) in enumerate(zip(shapes, offsets.split(points, dim=3), strict=True)):
        reference = references[:, :, level, None, None].expand(*offset.shape[:-1], -1)  # [B, N, H, P, 2 or 4]
        height, width = size
        if reference.shape[-1] == 2:
            scale = 1 / torch.tensor([width, height], dtype=offsets.dtype, device=offsets.device).clamp(min=1)
        else:
            scale = 0.5 / max(points[level], 1)
        nowhere = ~_located(reference.detach(), offset.detach(), scale).isfinite().all(dim=-1, keepdim=True)
        # masked before the arithmetic, too: 0 * inf would be a NaN in the gradients
        location = _located(reference.masked_fill(nowhere, 0), offset.masked_fill(nowhere, 0), scale)
        located.append(location.masked_fill(nowhere, torch.nan))
    return torch.cat(located, dim=3)


def _located(reference: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    box = 1 if reference.shape[-1] == 2 else reference[..., 2:]
    return reference[..., :2] + offset * scale * box
