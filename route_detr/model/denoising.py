"""Contrastive denoising (DINO, arXiv 2203.03605): queries that start from noisy targets and are to find them.

Each group holds two queries a target, a positive close to it and a negative farther away. All attend to the matching
queries and to their own group; matching queries see none of them. Two key intervals a query say so: no N x N mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import route_kernels as rk
from route_kernels.boxes import corners
from route_kernels.nn import BoxTargets

from .boxes import inverse_sigmoid
from .structures import DenoisingTargets, Queries

if TYPE_CHECKING:
    from ..config import DetectorConfig


class Denoising(nn.Module):
    """Matching queries [B, 1, N, .] and targets -> the same followed by denoising queries, with key ranges.

    With T targets in the fullest image there are max(1, pairs // T) groups of 2 T queries. Their content embeds the
    label, of which a share of label_noise / 2 is drawn anew. Their box is the target's with each side moved by up to
    box_noise half sides for positives, one to two times that for negatives.
    """

    label_noise, box_noise = 0.5, 1.0

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.content = nn.Embedding(config.num_classes, config.embed_dim)

    def forward(self, queries: Queries, targets: BoxTargets) -> Queries:
        device, fullest = targets.labels.device, max(targets.counts, default=0)
        groups = max(1, self.config.denoising_pairs // max(1, fullest))
        own = torch.arange(fullest, device=device).repeat_interleave(2).repeat(groups).expand(len(targets.counts), -1)
        first, counts = torch.tensor([targets.first, targets.counts], device=device)[..., None]
        present = own < counts
        positive = present & (torch.arange(own.shape[1], device=device) % 2 == 0)
        known = DenoisingTargets((first + own) * present, positive, present, groups)
        content = self.content(self._noisy_labels(targets.labels[known.target]))
        boxes = self._noisy_boxes(targets.boxes[known.target], ~positive)
        logits = inverse_sigmoid(boxes)[:, None].to(queries.box_logits.dtype)
        return queries._replace(
            content=torch.cat([queries.content, content[:, None].to(queries.content.dtype)], 2),
            box_logits=torch.cat([queries.box_logits, logits], 2),
            boxes=torch.cat([queries.boxes, logits.sigmoid()], 2),
            key_ranges=key_ranges(queries.content.shape[2], known),
            denoising=known,
        )

    def _noisy_labels(self, labels: Tensor) -> Tensor:
        drawn_anew = torch.rand(labels.shape, device=labels.device) < 0.5 * self.label_noise
        return torch.where(drawn_anew, torch.randint_like(labels, self.config.num_classes), labels)

    def _noisy_boxes(self, boxes: Tensor, negative: Tensor) -> Tensor:
        """A box whose sides cross has no extent left in that direction."""
        distance = torch.rand_like(boxes) + negative[..., None]
        direction = torch.randint_like(boxes, 2) * 2 - 1
        half_sides = 0.5 * boxes[..., 2:].repeat(1, 1, 2)
        moved = corners(boxes) + direction * distance * self.box_noise * half_sides
        low, high = moved.clamp(0, 1).split(2, -1)
        return torch.cat([(low + high) / 2, (high - low).clamp_min(0)], -1)


def key_ranges(matching: int, known: DenoisingTargets) -> Tensor:
    """Who may see whom, as `routed_attention` takes it: int32 [B, matching + D, 2, 2].

    First the matching queries, then the present queries of the own group; absent queries see none.
    """
    batch, count = known.target.shape
    ranges = torch.zeros(batch, matching + count, 2, 2, dtype=torch.int32, device=known.target.device)
    ranges[:, :, 0, 1] = matching
    slots = torch.arange(count, device=known.target.device)
    start = matching + slots - slots % max(1, known.group_size)
    ranges[:, matching:, 1, 0] = start
    ranges[:, matching:, 1, 1] = start + known.group_counts[:, None]
    ranges[:, matching:] *= known.present[..., None, None]
    return ranges


def group_similarity(content: Tensor, known: DenoisingTargets) -> Tensor:
    """`query_similarity` of denoising queries [B, D, C] among the present ones of their group: [B, D]."""
    shape = len(content) * known.groups, known.group_size, content.shape[-1]
    groups = (content * known.present[..., None]).reshape(shape)
    among_all = rk.query_similarity(groups).reshape(known.target.shape)
    return among_all * (known.group_size / known.group_counts.clamp_min(1).to(content.dtype))[:, None]
