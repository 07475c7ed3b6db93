"""Parts of every transformer layer: embeddings, heads, and its blocks at each memory level (docs/memory.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

import route_kernels as rk
from route_kernels.nn import AddLayerNorm, FeedForward, MSDeformAttn, RoutedSelfAttention
from route_kernels.recompute import recomputed

from .boxes import BOX_LOGIT_LIMIT

if TYPE_CHECKING:
    from ..config import DetectorConfig

MemoryLevel = Literal["none", "fused", "lean", "tight", "min"]  # each saves what those before it save
CHUNKS = 8  # of the tokens, in a feed-forward that is computed again in backward
PRIOR_PROBABILITY = 0.01  # of each class at the start (focal loss, arXiv 1708.02002)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, with ReLU in between."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class SineEmbedding(nn.Module):
    """[..., k] in [0, 1] -> [..., k dim]: of each coordinate sin and cos of 2 pi x, in turn, at dim / 2 wavelengths.

    DETR's for image positions (arXiv 2005.12872), Deformable DETR's for boxes (arXiv 2010.04159).
    """

    def __init__(self, dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        frequencies = 2 * math.pi * temperature ** -(torch.arange(dim // 2) * (2 / dim))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, coordinates: Tensor) -> Tensor:
        angles = coordinates[..., None] * self.frequencies
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


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
        """The reference box, corrected: logits [..., 4]."""
        return functional.hardtanh(reference + self.refine(content), -BOX_LOGIT_LIMIT, BOX_LOGIT_LIMIT)


class AddNorm(nn.LayerNorm):
    """x, residual [..., C], of one shape -> LayerNorm(residual + x)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(residual + x)


class SummedAttention(MSDeformAttn):
    """`MSDeformAttn` whose sum of query and position is made once and kept for backward."""

    def forward(self, query: Tensor, *others: Any, query_pos: Tensor | None = None, **named: Any) -> Tensor:
        return super().forward(query if query_pos is None else query + query_pos, *others, **named)


class Blocks:
    """Makes the blocks of a detector for its memory level, and runs what backward may run again."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config

    def saves(self, level: MemoryLevel) -> bool:
        """Whether the configured memory level is at least `level`."""
        levels = get_args(MemoryLevel)
        return levels.index(self.config.memory) >= levels.index(level)

    def backend(self) -> AbstractContextManager[None]:
        """At `none` the ops of a block run as PyTorch alone has them, every intermediate kept."""
        return rk.backend("eager") if self.config.memory == "none" else nullcontext()

    def norm(self) -> nn.LayerNorm:
        """x, residual -> LayerNorm(residual + x); from `lean` on only its output is kept."""
        return (AddLayerNorm if self.saves("lean") else AddNorm)(self.config.embed_dim)

    def feed_forward(self) -> FeedForward:
        """Linear, ReLU, Linear; from `lean` on the hidden layer is computed again."""
        return FeedForward(self.config.embed_dim, self.config.ffn_dim, chunks=CHUNKS if self.saves("lean") else None)

    def self_attention(self) -> RoutedSelfAttention:
        """Attention of queries with a routing bias; from `lean` on it projects q, k and v again: they are few."""
        return RoutedSelfAttention(self.config.embed_dim, self.config.num_heads, recompute=self.saves("lean"))

    def deformable_attention(self, in_encoder: bool) -> MSDeformAttn:
        """At `lean` memory is cast again for the value; from `tight` on value, offsets and logits are projected again.

        in_encoder: at `min` the layer around it runs again, so that it needs neither.
        """
        config = self.config
        kind = MSDeformAttn if self.saves("lean") else SummedAttention
        sizes = config.embed_dim, config.num_levels, config.num_heads, config.num_points
        again = self.saves("tight") and not (in_encoder and self.saves("min"))
        return kind(*sizes, recompute=again, recast=config.memory == "lean")

    def run_encoder_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """layer(*inputs); at `min` backward runs it again."""
        return recomputed(layer, *inputs, kept=()) if self.saves("min") else layer(*inputs)

    def run_scoring(self, scoring: Callable[..., Any], *inputs: Tensor) -> Any:
        """scoring(*inputs) of all positions in the first stage; from `lean` on backward runs it again."""
        return recomputed(scoring, *inputs, kept=()) if self.saves("lean") else scoring(*inputs)
