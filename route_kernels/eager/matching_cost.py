"""Matching costs as the public detectors have them: pairwise L1 and GIoU, class costs gathered by label."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..boxes import corners, generalized_iou


def matching_cost(
    logits: torch.Tensor,  # [B, G, N, K]
    boxes: torch.Tensor,  # [B, G, N, 4]
    true_boxes: torch.Tensor,  # [T, 4]
    labels: torch.Tensor,  # [T]
    counts: Sequence[int],
    class_cost: str,
    scalars: Sequence[float],
) -> torch.Tensor:
    """[T, G, N], float32 (float64 for float64), an image at a time."""
    class_weight, l1_weight, giou_weight, alpha, gamma = scalars
    dtype = torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)
    boxes, true_boxes = boxes.to(dtype), true_boxes.to(dtype)
    if class_cost == "softmax":
        classes = -logits.to(dtype).softmax(-1)
    else:
        log_p, log_rest = (torch.nn.functional.logsigmoid(x) for x in (logits.to(dtype), -logits.to(dtype)))
        p = logits.to(dtype).sigmoid()
        classes = (1 - alpha) * p**gamma * log_rest - alpha * (1 - p) ** gamma * log_p
    costs = [boxes.new_empty(0, *boxes.shape[1:3])]
    targets = zip(true_boxes.split(list(counts)), labels.split(list(counts)), strict=True)
    for image, (true, label) in enumerate(targets):
        predicted = boxes[image].flatten(0, 1)  # [G N, 4]
        box_cost = l1_weight * torch.cdist(true, predicted, p=1)
        box_cost = box_cost - giou_weight * generalized_iou(corners(true)[:, None], corners(predicted)[None])
        costs.append(
            class_weight * classes[image][..., label].permute(2, 0, 1) + box_cost.unflatten(1, boxes.shape[1:3])
        )
    cost = torch.cat(costs)
    return torch.where(cost.isfinite(), cost, -torch.inf)
