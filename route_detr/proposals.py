"""First stage: every memory position proposes one box with a class-agnostic score; the best start the queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .boxes import inverse_sigmoid
from .config import DetectorConfig
from .encoder import Memory
from .heads import PredictionHead, Predictions
from .position import box_embedding

BASE_SIZE = 0.05  # side of the finest level's proposals, doubled with each level
BORDER = 0.01  # a proposal centred closer to the border, or larger than 1 - BORDER, is left out


class Queries(NamedTuple):
    """What enters a decoder layer, for G branches."""

    content: Tensor  # [B, G, N, C]
    position: Tensor  # [B, G, N, C], the same for all branches
    box_logits: Tensor  # [B, G, N, 4] inverse sigmoid of the reference boxes, detached
    logits: Tensor | None = None  # [B, G, N, K] class logits of the layer before; None before the first
    key_ranges: Tensor | None = None  # [B, N, 2, 2] int32: which queries each may see; None: all


class Proposals(nn.Module):
    """Memory -> class-agnostic predictions for all S positions, and queries from the best.

    The position of a query comes from its proposal's box. Its content is learned (mixed query selection: DINO,
    arXiv 2203.03605) or the proposal's feature, detached, which knows what it stands on and so trains sooner.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.head = PredictionHead(dim, 1)
        self.num_queries = config.num_queries
        learned = config.query_content == "learned"
        self.content = nn.Parameter(torch.randn(config.num_queries, dim)) if learned else None
        self.position = nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim))

    def forward(self, memory: Memory) -> tuple[Predictions, Queries]:
        """Queries are the best num_queries proposals, or all S where there are fewer."""
        anchors, usable = self._anchors(memory)
        features = self.project(memory.features * usable[..., None])
        scores, box_logits = self.head(features, inverse_sigmoid(anchors))
        count = min(self.num_queries, scores.shape[1])
        ranking = scores.detach()[..., 0].masked_fill(~usable, -torch.inf)
        best = ranking.topk(count, dim=1).indices
        best_logits = box_logits.detach().gather(1, best[..., None].expand(-1, -1, 4))
        position = self.position(box_embedding(best_logits.sigmoid(), features.shape[-1]))
        if self.content is None:
            content = features.detach().gather(1, best[..., None].expand_as(position))
        else:
            content = self.content[:count].expand_as(position)
        queries = Queries(content[:, None], position[:, None], best_logits[:, None])
        return Predictions(scores[:, None], box_logits.sigmoid()[:, None]), queries

    @staticmethod
    def _anchors(memory: Memory) -> tuple[Tensor, Tensor]:
        """Boxes [B, S, 4] around all positions; [B, S] bool: inside the image. The others become (1, 1, 1, 1)."""
        positions = memory.positions.expand(memory.features.shape[0], -1, -1)
        sizes = [
            positions.new_full((height * width,), BASE_SIZE * 2.0**level)
            for level, (height, width) in enumerate(memory.spatial_shapes)
        ]
        side = torch.cat(sizes).expand(positions.shape[:2])[..., None]
        anchors = torch.cat([positions, side, side], -1)
        usable = ((anchors > BORDER) & (anchors < 1 - BORDER)).all(-1)
        if memory.padding is not None:
            usable = usable & ~memory.padding
        return anchors.masked_fill(~usable[..., None], 1.0), usable
