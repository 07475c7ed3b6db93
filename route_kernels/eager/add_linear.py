"""A position added before a linear layer."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def add_linear(
    x: torch.Tensor,  # [B, N, C]
    position: torch.Tensor,  # [B or 1, N, C]
    weight: torch.Tensor,  # [O, C]
    bias: torch.Tensor | None,  # [O]
    dtype: torch.dtype | None = None,  # what autocast casts to, which PyTorch does by itself
) -> torch.Tensor:
    """linear(x + position, weight, bias): [B, N, O]."""
    return F.linear(x + position, weight, bias)
