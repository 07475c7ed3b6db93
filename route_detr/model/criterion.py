"""Losses of Deformable DETR (focal, L1, GIoU), of masks and of denoising; L = L_main + alpha(t) L_aux in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from route_kernels.nn import HungarianMatcher, Matches, PredictionSet, SetCriterion, pack_targets
from route_kernels.nn.set_criterion import summed

from .masks import mask_cost, mask_losses, mask_targets
from .structures import DetectorOutput, MaskTargets, Predictions, side_by_side

if TYPE_CHECKING:
    from ..config import TrainConfig

MASK, DICE = 5.0, 5.0  # weights of the costs in matching, Mask2Former's


class Criterion:
    """DetectorOutput and targets -> {"loss": total, and every weighted part by name, detached; the parts sum to it}.

    Parts are "proposals/class", "layer0/l1" where the branches share a result (counted 1 + alpha times), and
    "layer2.main/giou", "layer2.aux/giou" (counted alpha times) after the fork; "layer0.denoising/l1" of denoising
    queries; "layer0/mask" (cross-entropy) and "layer0/dice" of a detector with masks. All are divided by the number of
    target boxes (at least 1), those of denoising by its groups too.
    """

    def __init__(self, config: TrainConfig, matcher: HungarianMatcher | None = None) -> None:
        self.config = config
        weights = {"l1_weight": config.l1_weight, "giou_weight": config.giou_weight}
        self.boxes = SetCriterion(matcher, class_weight=config.class_weight, **weights)

    def __call__(self, output: DetectorOutput, targets: Sequence, box_count: Tensor | None = None) -> dict[str, Tensor]:
        """targets: each has boxes [T, 4] (cx, cy, w, h) in [0, 1], labels [T] int64, masks [T, h, w] bool to segment.
        box_count: 0-dim, the number of boxes to divide by, for a batch that is part of a larger one.

        The only wait for the device is the copy of the costs: labels and boxes are checked where the host has them.

        Raises ValueError for a wrong number of targets, missing masks, a label out of range or a box that is not
        finite, FloatingPointError for a matching cost that is not finite.
        """
        batch, _, num_classes = output.logits.shape
        if len(targets) != batch:
            raise ValueError(f"targets: expected one for each of {batch} images, got {len(targets)}")
        boxes = output.proposals.boxes
        packed = pack_targets(targets, boxes.device, _precise(boxes.dtype), num_classes)
        decoder, more, masks = side_by_side(output.layers), None, None
        sets = [PredictionSet(["proposals"], *output.proposals[:2]), _rows(output.layers, decoder, output.aux_weight)]
        if output.denoising is not None:
            layers, known = output.denoising
            rows = _rows(layers, side_by_side(layers), output.aux_weight)
            target = known.target.masked_fill(~known.positive, -1)
            names, weights = [f"{name}.denoising" for name in rows.names], rows.weights / known.groups
            sets.append(rows._replace(names=names, weights=weights, target=target, counted=known.present))
        with torch.autocast(boxes.device.type, enabled=False):
            if output.pixel_embeddings is not None:
                pixels = output.pixel_embeddings.to(packed.boxes.dtype)
                decoder = decoder._replace(mask_embeddings=decoder.mask_embeddings.to(pixels.dtype))
                masks = mask_targets(targets, pixels)
                more = [None, partial(self._mask_cost, decoder, pixels, masks)]
            matched = self.boxes.matched(sets, packed, more)
            parts = [self.boxes.losses(each, packed, matches) for each, matches in matched]
            if masks is not None:
                parts.append(self._mask_losses(sets[1], decoder, pixels, masks, matched[1][1]))
            return summed(parts, 1 / (max(sum(packed.counts), 1) if box_count is None else box_count))

    def _mask_cost(self, decoder: Predictions, pixels: Tensor, masks: MaskTargets, image: int) -> Tensor:
        mask, dice = mask_cost(decoder.mask_embeddings[image], pixels, masks, image, self.config.mask_points)
        return MASK * mask + DICE * dice

    def _mask_losses(
        self, rows: PredictionSet, decoder: Predictions, pixels: Tensor, masks: MaskTargets, matches: Matches
    ) -> tuple[list[str], Tensor]:
        per_image = [len(rows.names) * count for count in matches.counts]
        branches = (len(rows.names), -1)
        pairs = zip(matches.query.split(per_image), matches.own.split(per_image), strict=True)
        pairs = [(query.view(branches), own.view(branches)) for query, own in pairs]
        mask, dice = mask_losses(decoder.mask_embeddings, pixels, masks, pairs, self.config.mask_points).unbind(1)
        losses = torch.stack([self.config.mask_weight * mask, self.config.dice_weight * dice]) * rows.weights
        return [f"{name}/{kind}" for kind in ("mask", "dice") for name in rows.names], losses.flatten()


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(layers: Sequence[Predictions], decoder: Predictions, aux_weight: Tensor) -> PredictionSet:
    """All rows of a decoder side by side, with their names and loss weights: 1 + alpha where the branches are one."""
    rows, alpha = {}, aux_weight.to(_precise(decoder.boxes.dtype))
    both, one = 1 + alpha, torch.ones_like(alpha)
    for index, predictions in enumerate(layers):
        if predictions.boxes.shape[1] == 1:
            rows[f"layer{index}"] = both
        else:
            rows |= {f"layer{index}.main": one, f"layer{index}.aux": alpha}
    return PredictionSet(list(rows), *decoder[:2], torch.stack(list(rows.values())))
