"""What every transformer layer is made of, at each memory level (docs/memory.md)."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

from torch import Tensor, nn

from route_kernels.nn import AddLayerNorm, FeedForward, MSDeformAttn

from ..config import DetectorConfig, MemoryLevel

CHUNKS = 8  # of the tokens, in a feed-forward that is computed again in backward


def saves(config: DetectorConfig, level: MemoryLevel) -> bool:
    """Whether the configured memory level is at least `level`."""
    levels = get_args(MemoryLevel)
    return levels.index(config.memory) >= levels.index(level)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, with ReLU in between."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class AddNorm(nn.LayerNorm):
    """x, residual [..., C], of one shape -> LayerNorm(residual + x)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(residual + x)


def add_norm(config: DetectorConfig) -> nn.LayerNorm:
    """x, residual -> LayerNorm(residual + x); from `lean` on only its output is kept."""
    return (AddLayerNorm if saves(config, "lean") else AddNorm)(config.embed_dim)


def feed_forward(config: DetectorConfig) -> FeedForward:
    """Linear, ReLU, Linear; from `lean` on the hidden layer is computed again."""
    return FeedForward(config.embed_dim, config.ffn_dim, chunks=CHUNKS if saves(config, "lean") else None)


def deformable_attention(config: DetectorConfig, whole_layer: bool = False) -> MSDeformAttn:
    """At `lean` memory is cast again for the value; from `tight` on value, offsets and logits are projected again.

    whole_layer: the layer around it is computed again, and so needs neither.
    """
    sizes = config.embed_dim, config.num_levels, config.num_heads, config.num_points
    recompute = saves(config, "tight") and not whole_layer
    return MSDeformAttn(*sizes, recompute=recompute, recast=config.memory == "lean")
