"""Sine embeddings of image positions and of boxes (DETR, arXiv 2005.12872; Deformable DETR, arXiv 2010.04159)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_embedding(coordinates: Tensor, dim: int, temperature: float = TEMPERATURE) -> Tensor:
    """sin and cos of 2 pi x at `dim` / 2 wavelengths: [...] in [0, 1] -> [..., dim], interleaved."""
    exponents = torch.arange(dim // 2, dtype=coordinates.dtype, device=coordinates.device) * (2 / dim)
    angles = coordinates[..., None] * (2 * math.pi * temperature**-exponents)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def image_positions(height: int, width: int, padding: Tensor | None, like: Tensor, offset: float = 0.5) -> Tensor:
    """Pixels, by default their centres, as fractions of each image's own (unpadded) extent.

    padding: [B, h, w] bool, True = padding, or None when no pixel is. Returns [B, h, w, 2] (or [1, h, w, 2]) as
    (x, y), in the dtype and on the device of `like`. Positions in the padding lie beyond 1.
    """
    x = torch.arange(width, dtype=like.dtype, device=like.device) + offset
    y = torch.arange(height, dtype=like.dtype, device=like.device) + offset
    if padding is None:
        x, y = x[None] / width, y[None] / height
    else:
        valid_width, valid_height = valid_extent(padding)
        x, y = x / valid_width[:, None], y / valid_height[:, None]
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)


def valid_extent(padding: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows, [B] each, that are not padding in [B, h, w]; at least one."""
    columns, rows = (~padding[:, 0, :]).sum(-1), (~padding[:, :, 0]).sum(-1)
    return columns.clamp_min(1), rows.clamp_min(1)


def image_embedding(positions: Tensor, dim: int, temperature: float = TEMPERATURE) -> Tensor:
    """[..., 2] -> [..., dim]: the halves embed y and x, as in DETR."""
    return sine_embedding(positions.flip(-1), dim // 2, temperature).flatten(-2)


def box_embedding(boxes: Tensor, dim: int) -> Tensor:
    """[..., 4] (cx, cy, w, h) in [0, 1] -> [..., 2 dim], dim / 2 for each coordinate."""
    return sine_embedding(boxes, dim // 2).flatten(-2)
