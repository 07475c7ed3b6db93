"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3), one corner after another.

Dimensions: B batch, S flattened feature positions, H heads, D channels of one head, N queries, L levels, P points of a
level, K points over all levels. float16 and bfloat16 values are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import torch

from ..precision import accumulate_dtype


def _bilinear(
    level: torch.Tensor,  # [B, H, h * w, D]
    height: int,
    width: int,
    locations: torch.Tensor,  # [B, H, T, 2] as (x, y) in [0, 1]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples at pixel x = x_loc w - 0.5 (align_corners=False), zeros outside: [B, H, T, D]; and which are inside."""
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN, too
    x, y = (torch.where(inside, pixel, torch.zeros_like(pixel)) for pixel in (x, y))
    column, row = x.detach().floor(), y.detach().floor()
    fraction_x, fraction_y = x - column, y - row
    sampled = torch.zeros((), dtype=level.dtype, device=level.device)
    for down, weight_y in ((0, 1 - fraction_y), (1, fraction_y)):
        for right, weight_x in ((0, 1 - fraction_x), (1, fraction_x)):
            c, r = column.long() + right, row.long() + down
            exists = inside & (c >= 0) & (c < width) & (r >= 0) & (r < height)
            position = torch.where(exists, r * width + c, torch.zeros_like(c))
            corner = level.gather(2, position.unsqueeze(-1).expand(-1, -1, -1, level.shape[-1]))
            weight = torch.where(exists, weight_y * weight_x, torch.zeros_like(x))
            sampled = sampled + weight.unsqueeze(-1) * corner.masked_fill(~exists.unsqueeze(-1), 0)
    return sampled, inside


def attend(
    value: torch.Tensor,  # [B, S, H, D]
    shapes: tuple[tuple[int, int], ...],
    starts: tuple[int, ...],
    points: tuple[int, ...],
    locations: torch.Tensor,  # [B, N, H, K, 2]
    weights: torch.Tensor,  # [B, N, H, K]
) -> torch.Tensor:
    batch, queries, heads, _ = weights.shape
    channels = value.shape[-1]
    nothing = value[:, :0].sum() + locations[..., :0].sum() + weights[..., :0].sum()  # 0, yet differentiable
    output = value.new_zeros(batch, heads, queries, channels) + nothing
    first_point = 0
    for (height, width), start, count in zip(shapes, starts, points, strict=True):
        if height * width > 0:
            level = value[:, start : start + height * width].transpose(1, 2)
            chosen = slice(first_point, first_point + count)
            location = locations[:, :, :, chosen].transpose(1, 2).reshape(batch, heads, queries * count, 2)
            weight = weights[:, :, :, chosen].transpose(1, 2)  # [B, H, N, P]
            sampled, inside = _bilinear(level, height, width, location)
            sampled = sampled.view(batch, heads, queries, count, channels)
            weight = weight.masked_fill(
                ~inside.view(batch, heads, queries, count), 0
            )  # else NaN would be NaN here, too
            output = output + (weight.unsqueeze(-1) * sampled).sum(dim=3)
        first_point += count
    return output.transpose(1, 2).reshape(batch, queries, heads * channels)


def ms_deform_attn(
    value: torch.Tensor,  # [B, S, H, D]
    shapes: tuple[tuple[int, int], ...],
    starts: tuple[int, ...],
    sampling_locations: torch.Tensor,  # [B, N, H, L, P, 2], or [B, N, H, K, 2] with points
    attention_weights: torch.Tensor,  # [B, N, H, L, P], or [B, N, H, K] with points
    points: tuple[int, ...] | None = None,  # of each level
) -> torch.Tensor:
    """sum over levels and points of weight times the bilinear sample: [B, N, H * D]."""
    dtype, accumulate = value.dtype, accumulate_dtype(value.dtype)
    locations, weights = sampling_locations.to(accumulate), attention_weights.to(accumulate)
    if points is None:
        points = (sampling_locations.shape[4],) * len(shapes)
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    return attend(value.to(accumulate), shapes, starts, points, locations, weights).to(dtype)
