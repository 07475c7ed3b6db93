"""Instance masks: dot products of a query's mask embedding with pixel embeddings at a quarter of the resolution.

The head is Mask DINO's (arXiv 2206.02777); cost and losses on points are Mask2Former's (arXiv 2112.01527, section 3.3),
the choice of uncertain points PointRend's (arXiv 1912.08193). Points are fractions (x, y) of an image without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import SineEmbedding
from .structures import MaskTargets, Memory

if TYPE_CHECKING:
    from ..config import DetectorConfig

MASK_STRIDE = 4
OVERSAMPLING = 3  # candidates a point, of which the most uncertain are kept
UNCERTAIN_SHARE = 0.75  # of the points; the others are uniform


class PixelEmbedding(nn.Module):
    """Backbone map [B, F, H/4, W/4] and the memory's finest level -> pixel embeddings [B, C, H/4, W/4].

    The level comes with its positions' sine embedding added, as queries do: a dot product tells things that look alike
    apart by where they are.
    """

    def __init__(self, config: DetectorConfig, channels: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.sine = SineEmbedding(dim // 2, config.position_temperature)
        groups = math.gcd(32, dim // 4)
        self.lateral = nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(groups, dim))
        self.project = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(groups, dim), nn.ReLU(), nn.Conv2d(dim, dim, 1)
        )

    def forward(self, fine: Tensor, memory: Memory) -> Tensor:
        height, width = memory.spatial_shapes[0]
        finest, positions = (x[:, : height * width] for x in (memory.features, memory.positions))
        placed = finest + self.sine(positions.flip(-1))
        encoded = placed.mT.unflatten(2, (height, width))
        encoded = functional.interpolate(encoded, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(self.lateral(fine) + encoded)


def mask_targets(targets: Sequence, pixels: Tensor) -> MaskTargets:
    """Mask targets from targets with `masks` [T, h, w] bool, on the device of the pixel embeddings [B, C, H, W].

    Raises ValueError for a target without masks.
    """
    for image, target in enumerate(targets):
        if getattr(target, "masks", None) is None:
            raise ValueError(f"targets[{image}].masks: expected bool [T, h, w] for a detector with masks, got none")
    masks = [target.masks.to(pixels.device, non_blocking=True) for target in targets]
    extents = torch.tensor([each.shape[:0:-1] for each in masks], dtype=pixels.dtype)
    extents /= MASK_STRIDE * torch.tensor(pixels.shape[:1:-1])
    return MaskTargets(masks, extents.to(pixels.device, non_blocking=True))


def sampled(maps: Tensor, points: Tensor) -> Tensor:
    """Maps [M, C, H, W] at points [M, P, 2], by bilinear interpolation: [M, C, P]."""
    grid = 2 * points[:, None] - 1
    return functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0]


def mask_cost(
    embeddings: Tensor, pixels: Tensor, targets: MaskTargets, image: int, count: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice cost [T, G, N] of one image at `count` random points; embeddings [G, N, C].

    Sampling and the dot product are linear, so the embeddings are sampled: no query's mask is formed. With logits x and
    truth t, the mean of softplus(x) - x t; and 1 - (2 sum sigmoid(x) t + 1) / (sum sigmoid(x) + sum t + 1). Branches
    come one by one: no more than three tables [N, points] at a time.
    """
    points = torch.rand(count, 2, dtype=pixels.dtype, device=pixels.device)
    truth = targets.at(image, points).T
    seen = sampled(pixels[image, None], (points * targets.extents[image])[None])[0]
    losses, dices = [], []
    for branch in embeddings:
        logits = branch @ seen
        inside = logits.sigmoid()
        losses.append((functional.softplus(logits).sum(-1) - (logits @ truth).T) / count)
        dices.append(1 - (2 * inside @ truth + 1).T / (inside.sum(-1) + truth.sum(0)[:, None] + 1))
    return torch.stack(losses, 1), torch.stack(dices, 1)


def mask_losses(
    embeddings: Tensor, pixels: Tensor, targets: MaskTargets, pairs: Sequence[tuple[Tensor, Tensor]], count: int
) -> Tensor:
    """Cross-entropy (mean over points) and dice loss of each row, summed over the matched pairs: [G, 2].

    embeddings [B, G, N, C]; pairs: (query, target), each [G, M] int64, of every image; count: points a mask, chosen for
    each anew: the most uncertain of a uniform draw, and some uniform.
    """
    losses = embeddings.new_zeros(embeddings.shape[1], 2)
    for image, (query, target) in enumerate(pairs):
        if query.numel() == 0:
            continue
        chosen = embeddings[image].gather(1, query[..., None].expand(-1, -1, embeddings.shape[-1]))
        maps = (chosen.flatten(0, 1) @ pixels[image].flatten(1)).unflatten(1, (1, *pixels.shape[-2:]))
        points = uncertain_points(maps, targets.extents[image], count)
        truth = targets.at(image, points, target.flatten())
        logits = sampled(maps, points * targets.extents[image])[:, 0]
        inside = logits.sigmoid()
        cross_entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        dice = 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)
        losses = losses + torch.stack([cross_entropy, dice], 1).unflatten(0, query.shape).sum(1)
    return losses


@torch.no_grad()
def uncertain_points(maps: Tensor, extent: Tensor, count: int) -> Tensor:
    """Points [M, count, 2]: UNCERTAIN_SHARE of them where logits [M, 1, H, W] are closest to 0, the others uniform."""
    certain = count - round(UNCERTAIN_SHARE * count)
    drawn = torch.rand(len(maps), OVERSAMPLING * count + certain, 2, dtype=maps.dtype, device=maps.device)
    uniform, candidates = drawn[:, :certain], drawn[:, certain:]
    uncertainty = -sampled(maps, candidates * extent)[:, 0].abs()
    best = uncertainty.topk(count - certain, dim=1).indices
    return torch.cat([candidates.gather(1, best[..., None].expand(-1, -1, 2)), uniform], 1)
