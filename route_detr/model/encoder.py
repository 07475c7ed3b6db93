"""Deformable encoder (Deformable DETR, arXiv 2010.04159) over the flattened feature levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Blocks, SineEmbedding
from .structures import Memory

if TYPE_CHECKING:
    from ..config import DetectorConfig


class Grid(NamedTuple):
    """The S positions of the flattened levels of images of one size."""

    pixels: Tensor  # [S, 2] (x, y) within the level
    sides: Tensor  # [L, 2] (w, h)
    level: Tensor  # [S] int64
    source: Tensor  # [S] int64: the nearest pixel of the flattened image
    edges: Tensor  # [S, L, 2] bool: in the first row of a level, in its first column


def grid_of(shapes: list[tuple[int, int]], image: tuple[int, int], device: torch.device) -> Grid:
    """shapes: (h, w) of each level; image: (H, W)."""
    pixels, level, source, edges = [], [], [], []
    for index, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(*(torch.arange(side, device=device) for side in (height, width)), indexing="ij")
        pixels.append(torch.stack([x, y], -1).flatten(0, 1))
        level.append(torch.full_like(pixels[-1][:, 0], index))
        source.append((y * image[0] // height * image[1] + x * image[1] // width).flatten())
        edges.append(functional.pad(pixels[-1].flip(-1)[:, None] == 0, (0, 0, index, len(shapes) - 1 - index)))
    sides = torch.tensor(shapes, device=device).flip(-1)
    return Grid(torch.cat(pixels), sides, torch.cat(level), torch.cat(source), torch.cat(edges))


class EncoderLayer(nn.Module):
    """Deformable self-attention of the memory, feed-forward."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        blocks = Blocks(config)
        self.attention = blocks.deformable_attention(in_encoder=True)
        self.attention_norm = blocks.norm()
        self.ffn = blocks.feed_forward()
        self.ffn_norm = blocks.norm()

    def forward(self, memory: Memory, position: Tensor, reference: Tensor) -> Tensor:
        x = memory.features
        attended = self.attention(x, reference, x, memory.spatial_shapes, memory.padding, query_pos=position)
        x = self.attention_norm(attended, x)
        return self.ffn_norm(self.ffn(x), x)


class Encoder(nn.Module):
    """Feature levels -> memory with encoded features; adds one learned embedding a level to the sine embedding."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, config.embed_dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.blocks, self.offset = Blocks(config), config.position_offset
        self.sine = SineEmbedding(config.embed_dim // 2, config.position_temperature)
        self._last_grid: tuple[object, Grid | None] = None, None

    def forward(self, levels: list[Tensor], padding_mask: Tensor | None = None) -> Memory:
        """Levels [B, C, h, w] and the images' padding [B, H, W] or None."""
        return self.encoded(*self.flattened(levels, padding_mask))

    def flattened(self, levels: list[Tensor], padding_mask: Tensor | None = None) -> tuple[Memory, Tensor]:
        """The memory before the first layer, its sine embedding [B or 1, S, C].

        The embedding's halves are of y and x, as in DETR, of pixels at `position_offset`; the memory's positions are
        pixel centres.
        """
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        features = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        grid = self._grid(shapes, (0, 0) if padding_mask is None else padding_mask.shape[1:], features.device)
        padding = valid_ratios = None
        extent = grid.sides[None]  # [B or 1, L, 2]: (w, h) of each level without padding
        if padding_mask is not None:
            padding = padding_mask.flatten(1)[:, grid.source]
            extent = (~padding[..., None, None] & grid.edges).sum(1).clamp_min(1)
            valid_ratios = extent.to(features.dtype) / grid.sides
        extent = extent.to(features.dtype)[:, grid.level]
        embedded = ((grid.pixels + self.offset) / extent).flip(-1)
        memory = Memory(features, (grid.pixels + 0.5) / extent, shapes, padding, valid_ratios)
        return memory, self.sine(embedded)

    def _grid(self, shapes: list[tuple[int, int]], image: tuple[int, int], device: torch.device) -> Grid:
        """That of the last call again where the sizes are the same."""
        if torch.compiler.is_compiling():
            return grid_of(shapes, image, device)
        sizes = shapes, tuple(image), device
        if self._last_grid[0] != sizes:
            with torch.inference_mode(False):
                self._last_grid = sizes, grid_of(shapes, image, device)
        return self._last_grid[1]

    def encoded(self, memory: Memory, embedding: Tensor) -> Memory:
        rows = zip(self.level_embedding, memory.spatial_shapes, strict=True)
        position = embedding + torch.cat([row.expand(height * width, -1) for row, (height, width) in rows])
        reference = memory.sampling_reference(memory.positions.expand(memory.features.shape[0], -1, -1))
        for layer in self.layers:
            features = self.blocks.run_encoder_layer(layer, memory, position, reference)
            memory = memory._replace(features=features)
        return memory
