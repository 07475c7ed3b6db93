"""Hungarian matching of predictions to targets: all layers, branches and images from one copy to the host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes import corners, generalized_iou
from .config import TrainConfig
from .heads import Predictions
from .masks import MaskTargets, mask_cost


class PaddedTargets(NamedTuple):
    """Targets of a batch, padded to T = the longest."""

    labels: Tensor  # [B, T] int64
    boxes: Tensor  # [B, T, 4] (cx, cy, w, h)
    counts: list[int]  # boxes of each image
    masks: MaskTargets | None = None


class Matches(NamedTuple):
    """M matched pairs for each of G prediction rows; every row matches min(N, T_b) targets of image b."""

    image: Tensor  # [M]
    query: Tensor  # [G, M]
    target: Tensor  # [G, M]
    counts: list[int]  # pairs of each image, which stand together


def padded_targets(targets: Sequence, like: Tensor) -> PaddedTargets:
    """Targets (objects with `boxes` [T, 4] and `labels` [T]) on the device and in the dtype of `like`."""
    labels = pad_sequence([target.labels for target in targets], batch_first=True)
    boxes = pad_sequence([target.boxes for target in targets], batch_first=True, padding_value=0.5)
    return PaddedTargets(
        labels.to(like.device, non_blocking=True),
        boxes.to(like.device, like.dtype, non_blocking=True),
        [len(target.labels) for target in targets],
    )


class Matcher:
    """Minimises the sum over matched pairs of focal class cost + L1 + (-GIoU) + mask costs, weighted as `config` says.

    Assignments are solved in threads: SciPy releases Python's lock meanwhile.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.threads = ThreadPoolExecutor(os.cpu_count())

    @torch.no_grad()
    def __call__(
        self,
        sets: Sequence[Predictions],
        targets: PaddedTargets,
        names: Sequence[Sequence[str]],
        pixels: Tensor | None = None,
    ) -> list[Matches]:
        """Matches of each set; a set of one class (K = 1) is class-agnostic. Costs cross to the host once.

        names: one for each of a set's G rows. Raises FloatingPointError with it where a cost is not finite.
        pixels: embeddings [B, E, h, w], where targets have masks.
        """
        costs = [self.cost(predictions, targets, pixels) for predictions in sets]
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        ends = np.cumsum([cost.numel() for cost in costs])[:-1]
        parts = [part.reshape(cost.shape) for part, cost in zip(np.split(on_host, ends), costs, strict=True)]
        return [self._assigned(*pair, targets) for pair in zip(parts, names, strict=True)]

    def cost(self, predictions: Predictions, targets: PaddedTargets, pixels: Tensor | None = None) -> Tensor:
        """[B, G, N, K] logits and [B, G, N, 4] boxes -> costs [B, G, N, T]."""
        config, logits = self.config, predictions.logits
        batch, branches, queries, classes = logits.shape
        labels = targets.labels if classes > 1 else torch.zeros_like(targets.labels)
        of_labels = logits.gather(3, labels[:, None, None].expand(batch, branches, queries, -1))
        class_cost = focal_cost(of_labels.to(predictions.boxes.dtype), config.focal_alpha, config.focal_gamma)
        predicted, true = predictions.boxes.flatten(1, 2), targets.boxes
        l1 = torch.cdist(predicted, true, p=1)
        giou = generalized_iou(corners(predicted)[:, :, None], corners(true)[:, None])
        box_cost = config.match_l1_weight * l1 - config.match_giou_weight * giou
        cost = config.match_class_weight * class_cost + box_cost.unflatten(1, (branches, queries))
        if predictions.mask_embeddings is not None and targets.masks is not None:
            masks = mask_cost(predictions.mask_embeddings, pixels, targets.masks, config.mask_points)
            cost += config.match_mask_weight * masks[0] + config.match_dice_weight * masks[1]
        return cost

    def _assigned(self, cost: np.ndarray, names: Sequence[str], targets: PaddedTargets) -> Matches:
        """Host cost [B, G, N, T] -> matches on the targets' device."""
        branches, queries = cost.shape[1:3]
        problems = []
        for image, count in enumerate(targets.counts):
            for branch in range(branches):
                problems.append(cost[image, branch, :, :count])
                if not np.isfinite(problems[-1]).all():
                    raise FloatingPointError(f"matching cost of {names[branch]}, image {image} is not finite")
        solved = list(self.threads.map(linear_sum_assignment, problems))
        rows = [np.concatenate([np.stack(pairs) for pairs in solved[row::branches]], 1) for row in range(branches)]
        counts = [min(queries, count) for count in targets.counts]
        image = np.repeat(np.arange(len(counts)), counts)
        query, target = np.stack(rows, 1)
        found = (
            torch.from_numpy(indices).to(targets.labels.device, non_blocking=True) for indices in (image, query, target)
        )
        return Matches(*found, counts)


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """How much the focal loss falls when a class turns from negative to positive (Deformable DETR), elementwise."""
    p = logits.sigmoid()
    log_p, log_not_p = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return (1 - alpha) * p**gamma * log_not_p - alpha * (1 - p) ** gamma * log_p
