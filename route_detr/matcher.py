"""Hungarian matching of predictions to targets: all layers, branches and images from one copy to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .boxes import corners, generalized_iou
from .config import TrainConfig
from .heads import Predictions


class PaddedTargets(NamedTuple):
    """Targets of a batch, padded to T = the longest."""

    labels: Tensor  # [B, T] int64
    boxes: Tensor  # [B, T, 4] (cx, cy, w, h)
    counts: list[int]  # boxes of each image


class Matches(NamedTuple):
    """M matched pairs for each of G prediction rows; every row matches min(N, T_b) targets of image b."""

    image: Tensor  # [M]
    query: Tensor  # [G, M]
    target: Tensor  # [G, M]


def padded_targets(targets: Sequence, like: Tensor) -> PaddedTargets:
    """Targets (objects with `boxes` [T, 4] and `labels` [T]) on the device and in the dtype of `like`."""
    counts = [len(target.labels) for target in targets]
    labels = torch.zeros(len(targets), max(counts, default=0), dtype=torch.int64)
    boxes = torch.full((*labels.shape, 4), 0.5, dtype=like.dtype)
    for image, (target, count) in enumerate(zip(targets, counts, strict=True)):
        labels[image, :count] = target.labels
        boxes[image, :count] = target.boxes
    return PaddedTargets(labels.to(like.device), boxes.to(like.device), counts)


class Matcher:
    """Minimises the sum over matched pairs of focal class cost + L1 + (-GIoU), weighted as `config` says."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(
        self, sets: Sequence[Predictions], targets: PaddedTargets, names: Sequence[Sequence[str]]
    ) -> list[Matches]:
        """Matches of each set; a set of one class (K = 1) is class-agnostic. Costs cross to the host once.

        names: one for each of a set's G rows. Raises FloatingPointError with it where a cost is not finite.
        """
        costs = [self.cost(predictions, targets) for predictions in sets]
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        device, matches, start = targets.labels.device, [], 0
        for cost, row_names in zip(costs, names, strict=True):
            stop = start + cost.numel()
            found = _assign(on_host[start:stop].reshape(cost.shape), targets.counts, row_names)
            matches.append(Matches(*(torch.from_numpy(index).to(device) for index in found)))
            start = stop
        return matches

    def cost(self, predictions: Predictions, targets: PaddedTargets) -> Tensor:
        """[B, G, N, K] logits and [B, G, N, 4] boxes -> costs [B, G, N, T]."""
        config, logits = self.config, predictions.logits
        batch, branches, queries, classes = logits.shape
        labels = targets.labels if classes > 1 else torch.zeros_like(targets.labels)
        class_cost = focal_cost(logits, config.focal_alpha, config.focal_gamma).gather(
            3, labels[:, None, None].expand(batch, branches, queries, -1)
        )
        predicted, true = predictions.boxes.flatten(1, 2), targets.boxes
        l1 = torch.cdist(predicted, true, p=1)
        giou = generalized_iou(corners(predicted)[:, :, None], corners(true)[:, None])
        box_cost = config.match_l1_weight * l1 - config.match_giou_weight * giou
        return config.match_class_weight * class_cost + box_cost.unflatten(1, (branches, queries))


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """How much the focal loss falls when a class turns from negative to positive (Deformable DETR), elementwise."""
    p = logits.sigmoid()
    log_p, log_not_p = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return (1 - alpha) * p**gamma * log_not_p - alpha * (1 - p) ** gamma * log_p


def _assign(cost: np.ndarray, counts: list[int], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """cost [B, G, N, T] -> image [M], query [G, M], target [G, M]."""
    branches, queries = cost.shape[1:3]
    images = np.repeat(np.arange(len(counts)), [min(queries, count) for count in counts])
    query, target = (np.empty((branches, len(images)), dtype=np.int64) for _ in range(2))
    start = 0
    for image, count in enumerate(counts):
        stop = start + min(queries, count)
        for branch in range(branches):
            wanted = cost[image, branch, :, :count]
            if not np.isfinite(wanted).all():
                raise FloatingPointError(f"matching cost of {names[branch]}, image {image} is not finite")
            query[branch, start:stop], target[branch, start:stop] = linear_sum_assignment(wanted)
        start = stop
    return images, query, target
