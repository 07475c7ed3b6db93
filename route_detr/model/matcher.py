"""Hungarian matching of predictions to targets: all layers, branches and images from one copy to the host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from route_kernels.boxes import corners, generalized_iou

from .masks import mask_cost
from .structures import Matches, PaddedTargets, Predictions

if TYPE_CHECKING:
    from ..config import TrainConfig

FOCAL = 0.25, 2.0  # alpha and gamma of the focal loss (arXiv 1708.02002)
CLASS, L1, GIOU, MASK, DICE = 2.0, 5.0, 2.0, 5.0, 5.0  # weights of the costs, Deformable DETR's and Mask2Former's


def padded_targets(targets: Sequence, like: Tensor) -> PaddedTargets:
    """Targets (objects with `boxes` [T, 4] and `labels` [T]) on the device and in the dtype of `like`."""
    labels = pad_sequence([target.labels for target in targets], batch_first=True).to(like.device, non_blocking=True)
    boxes = pad_sequence([target.boxes for target in targets], batch_first=True, padding_value=0.5)
    boxes = boxes.to(like.device, like.dtype, non_blocking=True)
    return PaddedTargets(labels, boxes, [len(target.labels) for target in targets])


class Matcher:
    """Minimises the sum over matched pairs of focal class cost + L1 + (-GIoU) + mask costs, weighted by the constants.

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
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu()
        parts = on_host.split([cost.numel() for cost in costs])
        parts = [part.view(cost.shape).numpy() for part, cost in zip(parts, costs, strict=True)]
        return [self._assigned(part, rows, targets) for part, rows in zip(parts, names, strict=True)]

    def cost(self, predictions: Predictions, targets: PaddedTargets, pixels: Tensor | None = None) -> Tensor:
        """[B, G, N, K] logits and [B, G, N, 4] boxes -> costs [B, G, N, T]."""
        logits = predictions.logits
        labels = targets.labels if logits.shape[-1] > 1 else torch.zeros_like(targets.labels)
        logits = logits.gather(3, labels[:, None, None].expand(*logits.shape[:3], -1)).to(predictions.boxes.dtype)
        predicted, true = predictions.boxes.flatten(1, 2), targets.boxes
        l1 = torch.cdist(predicted, true, p=1)
        giou = generalized_iou(corners(predicted)[:, :, None], corners(true)[:, None])
        box_cost = (L1 * l1 - GIOU * giou).unflatten(1, logits.shape[1:3])
        cost = CLASS * focal_cost(logits, *FOCAL) + box_cost
        if predictions.mask_embeddings is not None and targets.masks is not None:
            mask, dice = mask_cost(predictions.mask_embeddings, pixels, targets.masks, self.config.mask_points)
            cost += MASK * mask + DICE * dice
        return cost

    def _assigned(self, cost: np.ndarray, names: Sequence[str], targets: PaddedTargets) -> Matches:
        """Host cost [B, G, N, T] -> matches on the targets' device."""
        problems = []
        for image, count in enumerate(targets.counts):
            for name, problem in zip(names, cost[image, :, :, :count], strict=True):
                if not np.isfinite(problem).all():
                    raise FloatingPointError(f"matching cost of {name}, image {image} is not finite")
                problems.append(problem)
        solved = list(self.threads.map(linear_sum_assignment, problems))
        rows = [
            np.concatenate([np.stack(pairs) for pairs in solved[row :: len(names)]], 1) for row in range(len(names))
        ]
        counts = [min(cost.shape[2], count) for count in targets.counts]
        found = (np.repeat(np.arange(len(counts)), counts), *np.stack(rows, 1))
        return Matches(*(torch.from_numpy(each).to(targets.labels.device, non_blocking=True) for each in found), counts)


def focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """How much the focal loss falls when a class turns from negative to positive (Deformable DETR), elementwise."""
    p = logits.sigmoid()
    return (1 - alpha) * p**gamma * logsigmoid(-logits) - alpha * (1 - p) ** gamma * logsigmoid(logits)
