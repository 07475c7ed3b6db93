"""Sigmoid focal loss over one-hot targets, as the public detectors have it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def sigmoid_focal_loss(
    logits: torch.Tensor,  # [..., N, K]
    targets: torch.Tensor,  # [..., N]
    alpha: float,
    gamma: float,
) -> torch.Tensor:
    """alpha_t (1 - p_t)^gamma cross entropy, summed over the K classes: [..., N], float32 (float64 for float64)."""
    truth = (targets[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p_t = p * truth + (1 - p) * (1 - truth)
    alpha_t = alpha * truth + (1 - alpha) * (1 - truth)
    loss = (alpha_t * cross_entropy * (1 - p_t) ** gamma).sum(-1)
    return loss.to(torch.promote_types(logits.dtype, torch.float32))
