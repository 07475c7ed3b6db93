"""Boxes as logits."""

from __future__ import annotations

import torch
from torch import Tensor

BOX_LOGIT_LIMIT = 11.5  # boxes are refined as logits (inverse sigmoid) within this: 1e-5 from 0 and from 1


def inverse_sigmoid(x: Tensor) -> Tensor:
    """log(x / (1 - x)), clamped to +-BOX_LOGIT_LIMIT."""
    return torch.logit(x).clamp(-BOX_LOGIT_LIMIT, BOX_LOGIT_LIMIT)
