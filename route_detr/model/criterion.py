"""Losses of Deformable DETR (focal, L1, GIoU), of masks and of denoising; L = L_main + alpha(t) L_aux in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import route_kernels as rk
from route_kernels.boxes import corners, generalized_iou

from .masks import mask_losses, mask_targets
from .matcher import FOCAL, Matcher, padded_targets
from .structures import DenoisingTargets, DetectorOutput, Matches, PaddedTargets, Predictions, side_by_side

if TYPE_CHECKING:
    from ..config import TrainConfig


class Criterion:
    """DetectorOutput and targets -> {"loss": total, and every weighted part by name, detached; the parts sum to it}.

    Parts are "proposals/class", "layer0/l1" where the branches share a result (counted 1 + alpha times), and
    "layer2.main/giou", "layer2.aux/giou" (counted alpha times) after the fork; "layer0.denoising/l1" of denoising
    queries; "layer0/mask" (cross-entropy) and "layer0/dice" of a detector with masks. All are divided by the number of
    target boxes (at least 1), those of denoising by its groups too.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.matcher = Matcher(config)

    def __call__(self, output: DetectorOutput, targets: Sequence, box_count: Tensor | None = None) -> dict[str, Tensor]:
        """targets: each has boxes [T, 4] (cx, cy, w, h) in [0, 1], labels [T] int64, masks [T, h, w] bool to segment.
        box_count: 0-dim, the number of boxes to divide by, for a batch that is part of a larger one.

        The only wait for the device is the copy of the costs: labels are checked where they lie on the host.

        Raises ValueError for a wrong number of targets, missing masks, or a label out of range, FloatingPointError for
        a matching cost that is not finite.
        """
        _check_targets(targets, *output.logits.shape[::2])
        names, weights, decoder = _stacked(output.layers, output.aux_weight)
        proposals = output.proposals._replace(boxes=_precise(output.proposals.boxes))
        padded, pixels = padded_targets(targets, like=decoder.boxes), output.pixel_embeddings
        if pixels is not None:
            pixels = _precise(pixels)
            padded = padded._replace(masks=mask_targets(targets, pixels))
        with torch.autocast(decoder.boxes.device.type, enabled=False):
            share = 1 / (padded.boxes.new_full((), max(sum(padded.counts), 1)) if box_count is None else box_count)
            matches = self.matcher([proposals, decoder], padded, [["proposals"], names], pixels)
            rows = [
                (["proposals"], share, self._matched(proposals, matches[0], padded)),
                (names, weights * share, self._matched(decoder, matches[1], padded, pixels)),
            ]
            if output.denoising is not None:
                layers, known = output.denoising
                names, weights, denoised = _stacked(layers, output.aux_weight)
                names = [f"{name}.denoising" for name in names]
                rows.append((names, weights * share / known.groups, self._denoised(denoised, known, padded)))
            parts = {
                f"{name}/{kind}": part
                for names, weights, losses in rows
                for kind, loss in losses.items()
                for name, part in zip(names, (loss * weights).unbind(), strict=True)
            }
        return {"loss": torch.stack(list(parts.values())).sum()} | {name: part.detach() for name, part in parts.items()}

    def _matched(
        self, predictions: Predictions, matches: Matches, targets: PaddedTargets, pixels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses [G] of each kind, summed over images."""
        background = predictions.logits.shape[-1]
        rows = torch.arange(predictions.logits.shape[1], device=matches.image.device)[:, None]
        matched, true = (matches.image, rows, matches.query), (matches.image, matches.target)
        classes = matches.image.new_full(predictions.logits.shape[:3], background)
        classes[matched] = targets.labels[true] if background > 1 else 0
        losses = {"class": self._class_loss(predictions.logits, classes).sum((0, 2))}
        for kind, loss in self._box_losses(predictions.boxes[matched], targets.boxes[true]).items():
            losses[kind] = loss.sum(1)
        if predictions.mask_embeddings is not None and pixels is not None:
            pairs = zip(matches.query.split(matches.counts, 1), matches.target.split(matches.counts, 1), strict=True)
            masks = (predictions.mask_embeddings, pixels, targets.masks, list(pairs), self.config.mask_points)
            mask, dice = mask_losses(*masks).unbind(1)
            losses |= {"mask": self.config.mask_weight * mask, "dice": self.config.dice_weight * dice}
        return losses

    def _denoised(self, predictions: Predictions, known: DenoisingTargets, targets: PaddedTargets) -> dict[str, Tensor]:
        """Weighted losses [G] of each kind of queries whose targets are known, summed over images."""
        background = predictions.logits.shape[-1]
        classes = targets.labels.gather(1, known.target).masked_fill(~known.positive, background)[:, None]
        class_loss = self._class_loss(predictions.logits, classes.expand(predictions.logits.shape[:3]))
        true = targets.boxes.gather(1, known.target[..., None].expand(-1, -1, 4))[:, None].expand_as(predictions.boxes)
        losses = {"class": (class_loss * known.present[:, None]).sum((0, 2))}
        for kind, loss in self._box_losses(predictions.boxes, true).items():
            losses[kind] = (loss * known.positive[:, None]).sum((0, 2))
        return losses

    def _class_loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Logits [..., N, K] and classes [..., N], K where there is none of them -> losses [..., N]."""
        return self.config.class_weight * rk.sigmoid_focal_loss(logits, classes, *FOCAL, reduction="none")

    def _box_losses(self, predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
        """Boxes [..., 4] -> losses [...]."""
        l1 = (predicted - true).abs().sum(-1)
        giou = 1 - generalized_iou(corners(predicted), corners(true))
        return {"l1": self.config.l1_weight * l1, "giou": self.config.giou_weight * giou}


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _stacked(layers: Sequence[Predictions], aux_weight: Tensor) -> tuple[list[str], Tensor, Predictions]:
    """All rows of a decoder side by side: their names [R], loss weights [R] and predictions [B, R, N, .]."""
    logits, *others = side_by_side(layers)  # logits keep their dtype: the op that reads them sums in float32
    stacked = Predictions(logits, *(None if part is None else _precise(part) for part in others))
    alpha = aux_weight.to(stacked.boxes.dtype)
    rows = {}
    for index, predictions in enumerate(layers):
        if predictions.boxes.shape[1] == 1:
            rows[f"layer{index}"] = 1 + alpha
        else:
            rows |= {f"layer{index}.main": torch.ones_like(alpha), f"layer{index}.aux": alpha}
    return list(rows), torch.stack(list(rows.values())), stacked


def _check_targets(targets: Sequence, batch: int, num_classes: int) -> None:
    if len(targets) != batch:
        raise ValueError(f"targets: expected one for each of {batch} images, got {len(targets)}")
    for image, labels in enumerate(target.labels for target in targets):
        if labels.device.type == "cpu" and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            expected, got = f"numbers from 0 to {num_classes - 1}", f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"targets[{image}].labels: expected {expected}, got {got}")
