"""Sine embeddings of image positions and of boxes (DETR, arXiv 2005.12872; Deformable DETR, arXiv 2010.04159)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_embedding(coordinates: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """[..., k] in [0, 1] -> [..., k dim]: of each coordinate sin and cos of 2 pi x, in turn, at dim / 2 wavelengths."""
    exponents = torch.arange(dim // 2, dtype=coordinates.dtype, device=coordinates.device) * (2 / dim)
    angles = coordinates[..., None] * (2 * math.pi * temperature**-exponents)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)
