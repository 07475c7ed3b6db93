"""First stage: every memory position proposes one box with a class-agnostic score; the best start the queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .blocks import Blocks, PredictionHead, SineEmbedding
from .boxes import inverse_sigmoid
from .structures import Memory, Predictions, Queries

if TYPE_CHECKING:
    from ..config import DetectorConfig

BASE_SIZE = 0.05  # side of the finest level's proposals, doubled with each level
BORDER = 0.01  # a proposal centred closer to the border, or larger than 1 - BORDER, is left out


class Proposals(nn.Module):
    """Memory -> predictions for all S positions, and queries from the best.

    `config.query_content` and `config.query_position` say what the content and the position of a query come from:
    mixed query selection (DINO, arXiv 2203.03605) learns the content; "encoded" takes the proposal's feature, detached,
    which knows what it stands on and so trains sooner; "box" and "joint" (Deformable DETR, arXiv 2010.04159) embed the
    proposal's box.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dim, self.query_content, self.num_queries = config.embed_dim, config.query_content, config.num_queries
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.head = PredictionHead(dim, 1 if config.proposal_classes == "agnostic" else config.num_classes)
        self.sine = SineEmbedding(dim // 2)
        self.blocks = Blocks(config)
        self.content = self.position = None
        if self.query_content == "learned":
            self.content = nn.Parameter(torch.randn(self.num_queries, dim))
        elif self.query_content != "encoded":
            self.content = _embedding_layer(dim, 2 * dim if self.query_content == "joint" else dim)
        if config.query_position == "proposal" and self.query_content != "joint":
            self.position = _embedding_layer(dim, dim)

    def forward(self, memory: Memory) -> tuple[Predictions, Queries]:
        """Queries are the best num_queries proposals, or all S where there are fewer."""
        anchors, usable = self._anchors(memory)
        features, scores, box_logits = self.blocks.run_scoring(self._scored, memory.features, usable, anchors)
        batch, size, dim = features.shape
        ranking = scores.detach().amax(-1).masked_fill(~usable, -torch.inf)
        best = ranking.topk(min(self.num_queries, size), dim=1).indices[..., None]
        start = box_logits.detach().gather(1, best.expand(-1, -1, 4))
        boxes = start.sigmoid()
        embedding = self.sine(boxes)
        position = None if self.position is None else self.position(embedding)
        if self.query_content == "learned":
            content = self.content[: best.shape[1]].expand(batch, -1, -1)
        elif self.query_content == "encoded":
            content = features.detach().gather(1, best.expand(-1, -1, dim))
        elif self.query_content == "box":
            content = self.content(embedding)
        else:
            position, content = self.content(embedding).chunk(2, -1)
        position = None if position is None else position[:, None]
        queries = Queries(content[:, None], position, start[:, None], boxes[:, None])
        return Predictions(scores[:, None], box_logits.sigmoid()[:, None]), queries

    def _scored(self, memory: Tensor, usable: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, S, C], class logits [B, S, K] and box logits [B, S, 4] of all positions."""
        features = self.project(memory * usable[..., None])
        return features, *self.head(features, inverse_sigmoid(anchors))

    @staticmethod
    def _anchors(memory: Memory) -> tuple[Tensor, Tensor]:
        """Boxes [B, S, 4] around all positions; [B, S] bool: inside the image. The others become (1, 1, 1, 1)."""
        positions, shapes = memory.positions.expand(memory.features.shape[0], -1, -1), memory.spatial_shapes
        sides = [positions.new_full((h * w, 1), BASE_SIZE * 2.0**level) for level, (h, w) in enumerate(shapes)]
        anchors = torch.cat([positions, torch.cat(sides).expand_as(positions)], -1)
        usable = ((anchors > BORDER) & (anchors < 1 - BORDER)).all(-1)
        if memory.padding is not None:
            usable = usable & ~memory.padding
        return anchors.masked_fill(~usable[..., None], 1.0), usable


def _embedding_layer(dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * dim, width), nn.LayerNorm(width))
