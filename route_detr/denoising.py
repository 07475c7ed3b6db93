"""Contrastive denoising (DINO, arXiv 2203.03605): queries that start from noisy targets and are to find them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .heads import Predictions


class DenoisingTargets(NamedTuple):
    """What each of D denoising queries of an image is to find; `groups` copies of the targets lie side by side.

    Class losses count where `present`, against the target's label where `positive` and background elsewhere; box losses
    where `positive`. Both are divided by `groups` times the number of target boxes.
    """

    target: Tensor  # [B, D] int64, index among the image's targets; 0 where there is none
    positive: Tensor  # [B, D] bool: starts close to its target and is to find it
    present: Tensor  # [B, D] bool: positive or negative; False where images with fewer targets are filled up
    groups: int


class Denoised(NamedTuple):
    """Predictions of the denoising queries [B, G, D, .] of every decoder layer, and what they are to be."""

    layers: list[Predictions]
    targets: DenoisingTargets
