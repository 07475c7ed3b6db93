"""The loss of a DETR: all layers, branches and first-stage proposals matched and scored in a handful of calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.box_loss import box_loss
from ..ops.sigmoid_focal_loss import sigmoid_focal_loss
from .matching import BoxTargets, HungarianMatcher, Matches

KINDS = ("class", "l1", "giou")


class PredictionSet(NamedTuple):
    """Predictions of G layers or branches side by side, that share their number of queries and classes."""

    names: Sequence[str]  # of the G branches
    logits: Tensor  # [B, G, N, K]; K = 1: class-agnostic
    boxes: Tensor  # [B, G, N, 4] (cx, cy, w, h) in [0, 1]
    weights: Tensor | None = None  # [G] of their losses; None: 1
    target: Tensor | None = None  # [B, N] packed target of each query, -1 background, where it needs no matching
    counted: Tensor | None = None  # [B, N] bool, beside `target`: which queries have a loss


class SetCriterion:
    """Focal, L1 and GIoU losses of predictions that are matched with targets (Deformable DETR, arXiv 2010.04159).

    Args:
        matcher: finds the matches; `HungarianMatcher()`, unless given.
        class_weight, l1_weight, giou_weight: of the losses.
        alpha, gamma: of the focal loss.
    """

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        *,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        self.matcher = HungarianMatcher() if matcher is None else matcher
        self.class_weight, self.focal = class_weight, (alpha, gamma)
        self.box_weights = {"l1_weight": l1_weight, "giou_weight": giou_weight}

    def __call__(
        self, sets: Sequence[PredictionSet], targets: BoxTargets, box_count: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """{"loss": their sum, "NAME/class", "NAME/l1", "NAME/giou": every weighted part, detached}.

        targets: packed on the device of the predictions (`pack_targets`).
        box_count: what all are divided by; None: the number of targets, at least 1.

        Raises FloatingPointError for a matching cost that is not finite, naming branch, image, target and prediction.
        """
        share = 1 / (max(1, sum(targets.counts)) if box_count is None else box_count)
        return summed([self.losses(each, targets, target) for each, target in self.matched(sets, targets)], share)

    def matched(
        self,
        sets: Sequence[PredictionSet],
        targets: BoxTargets,
        more: Sequence[Callable[[int], Tensor] | None] | None = None,
    ) -> list[tuple[PredictionSet, Matches | None]]:
        """Each set with its matches, None where it comes with its targets; `more` as `HungarianMatcher` takes it."""
        open_sets = [each for each in sets if each.target is None]
        named = [each.names for each in open_sets]
        found = iter(self.matcher([(each.logits, each.boxes) for each in open_sets], targets, named, more))
        return [(each, next(found) if each.target is None else None) for each in sets]

    def losses(
        self, predictions: PredictionSet, targets: BoxTargets, matches: Matches | None
    ) -> tuple[list[str], Tensor]:
        """Names of the parts, "NAME/KIND", kind by kind, and their weighted sums over images [len(KINDS) * G]."""
        names, logits, boxes, weights, target, counted = predictions
        target = target[:, None].expand(boxes.shape[:3]) if matches is None else matches.target
        classes = _classes(target, targets.labels, logits.shape[-1])
        class_loss = sigmoid_focal_loss(logits, classes, *self.focal, reduction="none")
        if counted is not None:
            class_loss = class_loss * counted[:, None]
        class_loss = class_loss.sum((0, 2))
        if self.class_weight != 1:
            class_loss = class_loss * self.class_weight
        box_losses = box_loss(boxes, targets.boxes, target, **self.box_weights).sum((0, 2))
        parts = torch.cat([class_loss[None], box_losses.T])
        if weights is not None:
            parts = parts * weights
        return [f"{name}/{kind}" for kind in KINDS for name in names], parts.flatten()


def summed(parts: Sequence[tuple[list[str], Tensor]], share: Tensor | float = 1.0) -> dict[str, Tensor]:
    """{"loss": sum, and every part by name, detached}, all times `share`."""
    values = torch.cat([value for _, value in parts]) * share
    names = [name for names, _ in parts for name in names]
    return {"loss": values.sum(), **dict(zip(names, values.detach().unbind(), strict=True))}


def _classes(target: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Class of each query's target [B, G, N], K where there is none."""
    if classes == 1:
        return (target < 0).to(torch.int64)
    return torch.cat([labels, labels.new_full((1,), classes)])[target]  # -1 is the last
