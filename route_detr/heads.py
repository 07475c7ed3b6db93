"""The two small heads of a layer: class logits, and a correction of the reference box."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .boxes import BOX_LOGIT_LIMIT

PRIOR_PROBABILITY = 0.01  # of each class at the start (focal loss, arXiv 1708.02002)


class Predictions(NamedTuple):
    """Class logits [B, G, N, K] and boxes [B, G, N, 4] as (cx, cy, w, h) in [0, 1] of G branches."""

    logits: Tensor
    boxes: Tensor


class PredictionHead(nn.Module):
    """Content [..., C] and reference box logits [..., 4] -> class logits [..., K], refined box logits [..., 4]."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(embed_dim, num_classes)
        self.refine = nn.Sequential(
            nn.Linear(embed_dim, embed_dim),
            nn.ReLU(),
            nn.Linear(embed_dim, embed_dim),
            nn.ReLU(),
            nn.Linear(embed_dim, 4),
        )
        nn.init.constant_(self.classify.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        nn.init.zeros_(self.refine[-1].weight)
        nn.init.zeros_(self.refine[-1].bias)

    def forward(self, content: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        refined = (reference + self.refine(content)).clamp(-BOX_LOGIT_LIMIT, BOX_LOGIT_LIMIT)
        return self.classify(content), refined


def feed_forward(embed_dim: int, hidden_dim: int) -> nn.Sequential:
    """The feed-forward block of a transformer layer, Xavier-initialised."""
    block = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embed_dim))
    for linear in (block[0], block[2]):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return block


def joined_branches(main: Predictions, aux: Predictions) -> Predictions:
    """Two single-branch predictions side by side on the branch axis."""
    return Predictions(*(torch.cat(pair, 1) for pair in zip(main, aux, strict=True)))
