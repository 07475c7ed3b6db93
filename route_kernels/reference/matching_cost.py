"""Costs of matching predictions with targets (Deformable DETR, arXiv 2010.04159; DETR, arXiv 2005.12872)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..boxes import corners, generalized_iou
from ..precision import accumulate_dtype, without_autocast


def matching_cost(
    logits: torch.Tensor,  # [B, G, N, K]
    boxes: torch.Tensor,  # [B, G, N, 4]
    true_boxes: torch.Tensor,  # [T, 4]
    labels: torch.Tensor,  # [T]
    counts: Sequence[int],
    class_cost: str,
    scalars: Sequence[float],
) -> torch.Tensor:
    """[T, G, N], image by image; -inf where a cost is not finite or the label is no class."""
    class_weight, l1_weight, giou_weight, alpha, gamma = scalars
    dtype = accumulate_dtype(torch.promote_types(logits.dtype, boxes.dtype))
    costs = []
    with without_autocast(logits.device):
        rows = zip(logits, boxes, true_boxes.split(list(counts)), labels.split(list(counts)), strict=True)
        for logit, box, true, label in rows:
            logit, box, true = logit.to(dtype), box.to(dtype), true.to(dtype)[:, None, None]
            known = (label >= 0) & (label < logit.shape[-1])
            own = label.clamp(0, max(logit.shape[-1] - 1, 0))
            if class_cost == "softmax":
                classes = -logit.softmax(-1)[..., own].permute(2, 0, 1)
            else:
                x = logit[..., own].permute(2, 0, 1)  # [T_b, G, N]
                positive = torch.exp(gamma * F.logsigmoid(-x)) * -F.logsigmoid(x)
                negative = torch.exp(gamma * F.logsigmoid(x)) * -F.logsigmoid(-x)
                classes = alpha * positive - (1 - alpha) * negative
            l1 = (box - true).abs().sum(-1)
            giou = generalized_iou(corners(box), corners(true))
            cost = class_weight * classes + l1_weight * l1 - giou_weight * giou
            costs.append(torch.where(cost.isfinite() & known[:, None, None], cost, -torch.inf))
        return torch.cat(costs) if costs else boxes.new_empty((0, *boxes.shape[1:3]), dtype=dtype)
