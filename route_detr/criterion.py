"""Losses of Deformable DETR (focal, L1, GIoU) over all layers and branches, L = L_main + alpha(t) L_aux."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .boxes import corners, generalized_iou
from .config import TrainConfig
from .detector import DetectorOutput
from .heads import Predictions, side_by_side
from .matcher import Matcher, Matches, PaddedTargets, padded_targets


class Criterion:
    """DetectorOutput and targets -> {"loss": total, and every weighted part by name, detached; the parts sum to it}.

    Parts are "proposals/class", "layer0/l1" where the branches share a result (counted 1 + alpha times), and
    "layer2.main/giou", "layer2.aux/giou" (counted alpha times) after the fork. All are divided by the number of target
    boxes (averaged over the ranks of a distributed run, at least 1).
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.matcher = Matcher(config)

    def __call__(self, output: DetectorOutput, targets: Sequence) -> dict[str, Tensor]:
        """targets: one object an image with boxes [T, 4] (cx, cy, w, h) in [0, 1] and labels [T] int64.

        Raises ValueError for a wrong number of targets or a label out of range, FloatingPointError for a matching cost
        that is not finite.
        """
        _check_targets(targets, *output.logits.shape[::2])
        padded = padded_targets(targets, like=output.boxes)
        names, weights, decoder = stacked_layers(output)
        sets = [output.proposals, decoder]
        matches = self.matcher(sets, padded, [["proposals"], names])
        rows = torch.cat([self._losses(*pair, padded) for pair in zip(sets, matches, strict=True)])
        rows = rows * torch.cat([weights.new_ones(1), weights])[:, None] / _box_count(padded)
        losses = {"loss": rows.sum()}
        for name, row in zip(["proposals", *names], rows.detach().unbind(), strict=True):
            for kind, part in zip(("class", "l1", "giou"), row.unbind(), strict=True):
                losses[f"{name}/{kind}"] = part
        return losses

    def _losses(self, predictions: Predictions, matches: Matches, targets: PaddedTargets) -> Tensor:
        """Weighted class, L1 and GIoU losses of each row, summed over images: [G, 3]."""
        config = self.config
        rows = torch.arange(predictions.logits.shape[1], device=matches.image.device)[:, None]
        labels = targets.labels[matches.image, matches.target]
        if predictions.logits.shape[-1] == 1:
            labels = torch.zeros_like(labels)
        truth = torch.zeros_like(predictions.logits)
        truth[matches.image, rows, matches.query, labels] = 1
        class_loss = focal_loss(predictions.logits, truth, config.focal_alpha, config.focal_gamma)
        predicted = predictions.boxes[matches.image, rows, matches.query]
        true = targets.boxes[matches.image, matches.target]
        return torch.stack(
            [
                config.class_weight * class_loss.sum((0, 2, 3)),
                config.l1_weight * (predicted - true).abs().sum((1, 2)),
                config.giou_weight * (1 - generalized_iou(corners(predicted), corners(true))).sum(1),
            ],
            1,
        )


def stacked_layers(output: DetectorOutput) -> tuple[list[str], Tensor, Predictions]:
    """All decoder rows side by side: their names [R], loss weights [R] and predictions [B, R, N, .]."""
    names: list[str] = []
    weights: list[Tensor] = []
    alpha = output.aux_weight.to(output.boxes.dtype)
    for index, predictions in enumerate(output.layers):
        if predictions.boxes.shape[1] == 1:
            names.append(f"layer{index}")
            weights.append(1 + alpha)
        else:
            names += [f"layer{index}.main", f"layer{index}.aux"]
            weights += [torch.ones_like(alpha), alpha]
    return names, torch.stack(weights), side_by_side(output.layers)


def focal_loss(logits: Tensor, truth: Tensor, alpha: float, gamma: float) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t elementwise (arXiv 1708.02002); truth holds 0 and 1."""
    p = logits.sigmoid()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p_t = p * truth + (1 - p) * (1 - truth)
    alpha_t = alpha * truth + (1 - alpha) * (1 - truth)
    return alpha_t * (1 - p_t) ** gamma * cross_entropy


def _box_count(targets: PaddedTargets) -> Tensor:
    count = targets.boxes.new_tensor(float(sum(targets.counts)))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp_min(1)


def _check_targets(targets: Sequence, batch: int, num_classes: int) -> None:
    if len(targets) != batch:
        raise ValueError(f"targets: expected one for each of {batch} images, got {len(targets)}")
    for image, target in enumerate(targets):
        labels = target.labels
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"targets[{image}].labels: expected numbers from 0 to {num_classes - 1}, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
