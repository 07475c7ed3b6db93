"""A residual sum, then `layer_norm`."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def add_layer_norm(
    x: torch.Tensor,  # [..., C]
    residual: torch.Tensor,  # [..., C]
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """layer_norm(x + residual) in `dtype`: [..., C]."""
    total = (x + residual).to(dtype)
    return F.layer_norm(total, total.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
