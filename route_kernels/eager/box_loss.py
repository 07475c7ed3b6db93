"""Box losses as the public detectors have them: pairs are gathered, their losses scattered back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..boxes import corners, generalized_iou


def box_loss(
    boxes: torch.Tensor,  # [..., N, 4]
    true_boxes: torch.Tensor,  # [T, 4]
    target: torch.Tensor,  # [..., N]
    weights: Sequence[float],
) -> torch.Tensor:
    """[..., N, 2], float32 (float64 for float64)."""
    l1_weight, giou_weight = weights
    precise = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    true_boxes = true_boxes.to(precise.dtype)
    matched = (target >= 0) & (target < len(true_boxes))
    true = torch.cat([true_boxes, true_boxes.new_full((1, 4), 0.5)])[torch.where(matched, target, len(true_boxes))]
    l1 = torch.nn.functional.l1_loss(precise, true, reduction="none").sum(-1)
    giou = 1 - generalized_iou(corners(precise), corners(true))
    return torch.where(matched[..., None], torch.stack([l1_weight * l1, giou_weight * giou], -1), 0)
