"""The feed-forward block of a transformer layer, with its hidden layer written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..precision import without_autocast

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


def feed_forward(
    x: torch.Tensor,  # [..., C]
    w1: torch.Tensor,  # [F, C]
    b1: torch.Tensor | None,  # [F]
    w2: torch.Tensor,  # [O, F]
    b2: torch.Tensor | None,  # [O]
    activation: str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """activation(x W1^T + b1) W2^T + b2, in `dtype` where one is given: [..., O]."""
    if dtype is not None:
        x, w1, b1, w2, b2 = (None if tensor is None else tensor.to(dtype) for tensor in (x, w1, b1, w2, b2))
    with without_autocast(x.device):
        return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)
