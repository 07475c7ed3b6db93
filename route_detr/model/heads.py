"""The two small heads of a layer: class logits, and a correction of the reference box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import mlp
from .boxes import BOX_LOGIT_LIMIT

PRIOR_PROBABILITY = 0.01  # of each class at the start (focal loss, arXiv 1708.02002)


class Predictions(NamedTuple):
    """Of G branches; a query's mask is sigmoid(mask embedding . pixel embedding)."""

    logits: Tensor  # [B, G, N, K] of the classes
    boxes: Tensor  # [B, G, N, 4] (cx, cy, w, h) in [0, 1]
    mask_embeddings: Tensor | None = None  # [B, G, N, E] where the detector segments

    def of(self, queries: slice) -> Predictions:
        """Those of some of the N queries."""
        return Predictions(*(None if part is None else part[:, :, queries] for part in self))


class PredictionHead(nn.Module):
    """Content [..., C] and reference box logits [..., 4] -> class logits [..., K], refined box logits [..., 4]."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(embed_dim, num_classes)
        self.refine = mlp(embed_dim, embed_dim, embed_dim, 4)
        nn.init.constant_(self.classify.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        nn.init.zeros_(self.refine[-1].weight)
        nn.init.zeros_(self.refine[-1].bias)

    def forward(self, content: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        return self.classify(content), self.refined(content, reference)

    def refined(self, content: Tensor, reference: Tensor) -> Tensor:
        return (reference + self.refine(content)).clamp(-BOX_LOGIT_LIMIT, BOX_LOGIT_LIMIT)


def side_by_side(predictions: Sequence[Predictions]) -> Predictions:
    """Predictions of the same queries, one after another on the branch axis."""
    fields = zip(*predictions, strict=True)
    return Predictions(*(None if parts[0] is None else torch.cat(parts, 1) for parts in fields))
