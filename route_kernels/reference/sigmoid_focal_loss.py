"""Sigmoid focal loss of class indices (arXiv 1708.02002, equation 5)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..precision import accumulate_dtype, without_autocast


def sigmoid_focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """logits [..., N, K], targets [..., N] -> [..., N], summed over the K classes; a target outside [0, K) is none.

    With z = -logit for the target's class and logit for every other, p_t = sigmoid(-z):
    -alpha_t (1 - p_t)^gamma log p_t = alpha_t sigmoid(z)^gamma softplus(z).
    """
    classes = torch.arange(logits.shape[-1], device=logits.device)
    positive = targets.unsqueeze(-1) == classes  # [..., N, K]
    with without_autocast(logits.device):
        x = logits.to(accumulate_dtype(logits.dtype))
        z = torch.where(positive, -x, x)
        loss = torch.exp(gamma * F.logsigmoid(z)) * -F.logsigmoid(-z)
        return torch.where(positive, alpha * loss, (1 - alpha) * loss).sum(-1)
