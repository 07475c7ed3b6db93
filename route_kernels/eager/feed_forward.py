"""Linear, activation, linear: the hidden layer is kept for backward."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def feed_forward(
    x: torch.Tensor,  # [..., C]
    w1: torch.Tensor,  # [F, C]
    b1: torch.Tensor | None,  # [F]
    w2: torch.Tensor,  # [O, F]
    b2: torch.Tensor | None,  # [O]
    activation: str,
    dtype: torch.dtype | None = None,  # what autocast casts to, which PyTorch does by itself
) -> torch.Tensor:
    """linear(activation(linear(x, w1, b1)), w2, b2): [..., O]."""
    return F.linear(getattr(F, activation)(F.linear(x, w1, b1)), w2, b2)
