"""A linear layer of a sum, with the sum written out."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..precision import without_autocast


def add_linear(
    x: torch.Tensor,  # [..., C]
    position: torch.Tensor,  # [..., C], broadcastable to x
    weight: torch.Tensor,  # [O, C]
    bias: torch.Tensor | None,  # [O]
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(x + position) W^T + bias, the product in `dtype` where one is given: [..., O]."""
    total = x + position
    if dtype is not None:
        total, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (total, weight, bias))
    with without_autocast(x.device):
        return F.linear(total, weight, bias)
