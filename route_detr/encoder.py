"""Deformable encoder (Deformable DETR, arXiv 2010.04159) over the flattened feature levels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from route_kernels.recompute import recomputed

from .blocks import add_norm, deformable_attention, feed_forward, saves
from .config import DetectorConfig
from .position import TEMPERATURE, image_embedding, image_positions, valid_extent


class Memory(NamedTuple):
    """Feature levels of a batch, flattened to S positions."""

    features: Tensor  # [B, S, C]
    positions: Tensor  # [B or 1, S, 2] (x, y) as fractions of each image's own extent
    spatial_shapes: list[tuple[int, int]]  # (h, w) of each level
    padding: Tensor | None  # [B, S] bool, True = padding; None: no padding anywhere
    valid_ratios: Tensor | None  # [B, L, 2] (x, y): share of each level that is not padding

    def sampling_reference(self, reference: Tensor) -> Tensor:
        """Image fractions [B, N, 2 or 4] -> fractions of each padded level, [B, N, L or 1, 2 or 4]."""
        if self.valid_ratios is None:
            return reference[:, :, None]
        return reference[:, :, None] * self.valid_ratios[:, None].repeat(1, 1, 1, reference.shape[-1] // 2)


def flatten_levels(
    levels: list[Tensor], padding_mask: Tensor | None, temperature: float = TEMPERATURE, offset: float = 0.5
) -> tuple[Memory, Tensor]:
    """Levels [B, C, h, w] and the images' padding [B, H, W] or None -> memory, sine embedding [B or 1, S, C]."""
    shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
    features = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
    paddings = [None if padding_mask is None else _resized(padding_mask, shape) for shape in shapes]

    def at(offset: float) -> Tensor:
        grids = zip(shapes, paddings, strict=True)
        return torch.cat(
            [image_positions(*shape, padding, features, offset).flatten(1, 2) for shape, padding in grids], 1
        )

    positions, embedding = at(0.5), image_embedding(at(offset), features.shape[-1], temperature)
    if padding_mask is None:
        return Memory(features, positions, shapes, None, None), embedding
    ratios = [
        torch.stack(valid_extent(padding), -1) / features.new_tensor([width, height])
        for padding, (height, width) in zip(paddings, shapes, strict=True)
    ]
    padding = torch.cat([padding.flatten(1) for padding in paddings], 1)
    return Memory(features, positions, shapes, padding, torch.stack(ratios, 1)), embedding


def _resized(padding_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(padding_mask[:, None].float(), size=shape)[:, 0] > 0.5


class EncoderLayer(nn.Module):
    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.attention = deformable_attention(config, whole_layer=saves(config, "min"))
        self.attention_norm = add_norm(config)
        self.ffn = feed_forward(config)
        self.ffn_norm = add_norm(config)
        self.keeps_sum = not saves(config, "lean")

    def forward(self, memory: Memory, position: Tensor, reference: Tensor) -> Tensor:
        x = memory.features
        query, added = (x + position, None) if self.keeps_sum else (x, position)
        attended = self.attention(query, reference, x, memory.spatial_shapes, memory.padding, query_pos=added)
        x = self.attention_norm(attended, x)
        return self.ffn_norm(self.ffn(x), x)


class Encoder(nn.Module):
    """Memory -> memory with encoded features; adds one learned embedding a level to the sine embedding."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, config.embed_dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.recompute = saves(config, "min")

    def forward(self, memory: Memory, embedding: Tensor) -> Memory:
        sizes = [height * width for height, width in memory.spatial_shapes]
        level_embedding = torch.cat(
            [row.expand(size, -1) for row, size in zip(self.level_embedding, sizes, strict=True)]
        )
        batch = memory.features.shape[0]
        reference = memory.sampling_reference(memory.positions.expand(batch, -1, -1))
        position = embedding + level_embedding
        for layer in self.layers:
            inputs = (memory, position, reference)
            memory = memory._replace(features=recomputed(layer, *inputs, kept=()) if self.recompute else layer(*inputs))
        return memory
