"""Named tuples that the parts of the detector hand to each other.

B images, G branches (1, or main and auxiliary), N queries, D denoising queries, K classes, T targets of an image, S
positions of the L flattened feature levels, C channels, E channels of a mask embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RouteType = Literal["gated", "suppressor", "delegator"]
ROUTE_TYPES: tuple[RouteType, ...] = ("gated", "suppressor", "delegator")


class RoutingValues(NamedTuple):
    """The schedule at one step; `Detector.set_routing` takes it."""

    strengths: tuple[float, ...]  # lambda of each routed layer, first to last
    aux_weight: float  # alpha
    route_type: RouteType  # which products make up the bias


class Routing(NamedTuple):
    """The schedule as the decoder takes it: a new lambda is a new value in the same tensor, and no new graph."""

    strengths: Tensor  # [decoder layers] lambda; 0 where a layer is not routed
    active: tuple[bool, ...]  # of each decoder layer: lambda > 0
    route_type: RouteType


class Memory(NamedTuple):
    """Feature levels of a batch, flattened to S positions."""

    features: Tensor  # [B, S, C]
    positions: Tensor  # [B or 1, S, 2] (x, y) as fractions of each image's own extent; beyond 1 in its padding
    spatial_shapes: list[tuple[int, int]]  # (h, w) of each level
    padding: Tensor | None = None  # [B, S] bool, True = padding; None: no padding anywhere
    valid_ratios: Tensor | None = None  # [B, L, 2] (x, y): share of each level that is not padding

    def sampling_reference(self, reference: Tensor) -> Tensor:
        """Image fractions [B, N, 2 or 4] -> fractions of each padded level, [B, N, L or 1, 2 or 4]."""
        if self.valid_ratios is None:
            return reference[:, :, None]
        return reference[:, :, None] * self.valid_ratios[:, None].repeat(1, 1, 1, reference.shape[-1] // 2)


class MaskTargets(NamedTuple):
    """True masks of a batch, each image without padding, and what of the padded pixel embeddings its image covers."""

    masks: Sequence[Tensor]  # [T, h, w] bool of each image
    extents: Tensor  # [B, 2] (x, y) in (0, 1]

    def at(self, image: int, points: Tensor, target: Tensor | None = None) -> Tensor:
        """Whether points are inside, as 0 and 1: [P, 2] -> [T, P], or with `target` [M]: [M, P, 2] -> [M, P]."""
        masks = self.masks[image]
        sides = enumerate(masks.shape[:0:-1])  # x, y
        column, row = ((points[..., axis] * side).clamp_max(side - 1).long() for axis, side in sides)
        return (masks[:, row, column] if target is None else masks[target[:, None], row, column]).to(points.dtype)


class DenoisingTargets(NamedTuple):
    """Targets of each of D denoising queries of an image; `groups` copies of the targets lie side by side.

    Class losses count where `present`, against the target's label where `positive` and background elsewhere; box losses
    where `positive`. Both are divided by `groups` times the number of target boxes.
    """

    target: Tensor  # [B, D] int64, index among the packed targets; 0 where there is none
    positive: Tensor  # [B, D] bool: starts close to its target and is to find it
    present: Tensor  # [B, D] bool: positive or negative; False where images with fewer targets are filled up
    groups: int

    @property
    def group_size(self) -> int:
        """Queries of a group, absent ones too; the present ones come first."""
        return self.target.shape[1] // self.groups

    @property
    def group_counts(self) -> Tensor:
        """Present queries in each group of an image: [B] int64."""
        return self.present.sum(1) // self.groups


class Queries(NamedTuple):
    """Inputs of a decoder layer, for G branches; denoising queries, where there are any, follow the matching ones."""

    content: Tensor  # [B, G, N, C]
    position: Tensor | None  # [B, 1 or G, N, C]; None: the decoder makes it from the boxes
    box_logits: Tensor  # [B, G, N, 4] inverse sigmoid of the reference boxes, detached
    boxes: Tensor  # [B, G, N, 4] the reference boxes (cx, cy, w, h) in [0, 1], detached
    logits: Tensor | None = None  # [B, G, N, K] class logits of the layer before; None before the first
    attached: Tensor | None = None  # box_logits with the gradient to the layer before, to look forward twice
    key_ranges: Tensor | None = None  # [B, N, 2, 2] int32: which queries each may see; None: all
    denoising: DenoisingTargets | None = None

    @property
    def matching(self) -> int:
        """How many of the N queries are not denoising ones."""
        return self.content.shape[2] - (0 if self.denoising is None else self.denoising.target.shape[1])

    @property
    def confidence(self) -> Tensor:
        """Highest class probability that the layer before gave, 0 before the first: [B, G, N]."""
        return torch.zeros_like(self.content[..., 0]) if self.logits is None else self.logits.amax(-1).sigmoid()


class Predictions(NamedTuple):
    """A layer's result for G branches; a query's mask is sigmoid(mask embedding . pixel embedding)."""

    logits: Tensor  # [B, G, N, K] of the classes
    boxes: Tensor  # [B, G, N, 4] (cx, cy, w, h) in [0, 1]
    mask_embeddings: Tensor | None = None  # [B, G, N, E] where the detector segments

    def of(self, queries: slice) -> Predictions:
        """Those of some of the N queries."""
        return Predictions(*(None if part is None else part[:, :, queries] for part in self))


def side_by_side(predictions: Sequence[Predictions]) -> Predictions:
    """Predictions of the same queries, one after another on the branch axis."""
    fields = zip(*predictions, strict=True)
    return Predictions(*(None if parts[0] is None else torch.cat(parts, 1) for parts in fields))


class Denoised(NamedTuple):
    """Predictions of the denoising queries [B, G, D, .] of every decoder layer, and what they are to be."""

    layers: list[Predictions]
    targets: DenoisingTargets


class DetectorOutput(NamedTuple):
    """Predictions of every decoder layer [B, G, N, .] and of the first stage [B, 1, S, .].

    G = 2 holds (main, auxiliary); G = 1 is one result that stands for both branches.
    """

    layers: list[Predictions]
    proposals: Predictions
    aux_weight: Tensor  # alpha, 0-dim; 0 where there is no auxiliary branch
    denoising: Denoised | None = None  # in training
    pixel_embeddings: Tensor | None = None  # [B, E, h, w] at 1/4 of the images' size, to segment

    @property
    def logits(self) -> Tensor:
        """Class logits [B, N, K] of the main branch's last layer."""
        return self.layers[-1].logits[:, 0]

    @property
    def boxes(self) -> Tensor:
        """Boxes [B, N, 4] (cx, cy, w, h) in [0, 1] of the main branch's last layer."""
        return self.layers[-1].boxes[:, 0]
