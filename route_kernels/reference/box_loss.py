"""L1 and GIoU loss of matched boxes (DETR, arXiv 2005.12872, equation 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..boxes import corners, generalized_iou
from ..precision import accumulate_dtype, without_autocast


def box_loss(
    boxes: torch.Tensor,  # [..., N, 4]
    true_boxes: torch.Tensor,  # [T, 4]
    target: torch.Tensor,  # [..., N]
    weights: Sequence[float],
) -> torch.Tensor:
    """[..., N, 2]: w_l1 |p - t|_1 and w_giou (1 - GIoU(p, t)), 0 where target is outside [0, T)."""
    l1_weight, giou_weight = weights
    dtype, count = accumulate_dtype(boxes.dtype), true_boxes.shape[0]
    with without_autocast(boxes.device):
        matched = (target >= 0) & (target < count)
        filled = torch.cat([true_boxes.to(dtype), true_boxes.new_full((1, 4), 0.5, dtype=dtype)])
        true = filled[torch.where(matched, target, count)]
        predicted = torch.where(matched[..., None], boxes.to(dtype), 0.5)
        l1 = (predicted - true).abs().sum(-1)
        giou = 1 - generalized_iou(corners(predicted), corners(true))
        losses = torch.stack([l1_weight * l1, giou_weight * giou], -1)
        return torch.where(matched[..., None], losses, 0)
