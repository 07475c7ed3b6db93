"""Deformable encoder (Deformable DETR, arXiv 2010.04159) over the flattened feature levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Blocks, sine_embedding
from .structures import Memory

if TYPE_CHECKING:
    from ..config import DetectorConfig


def flatten_levels(
    levels: list[Tensor], padding_mask: Tensor | None, temperature: float = 10000.0, offset: float = 0.5
) -> tuple[Memory, Tensor]:
    """Levels [B, C, h, w] and the images' padding [B, H, W] or None -> memory, sine embedding [B or 1, S, C].

    The embedding's halves are of y and x, as in DETR, of pixels at `offset`; the memory's positions are pixel centres.
    """
    shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
    features = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
    centres, embedded, paddings, ratios = [], [], [], []
    for height, width in shapes:
        if padding_mask is None:
            padding = torch.zeros(1, height, width, dtype=torch.bool, device=features.device)
        else:
            padding = functional.interpolate(padding_mask[:, None].float(), size=(height, width))[:, 0] > 0.5
        columns, rows = (~padding[:, 0]).sum(-1).clamp_min(1), (~padding[:, :, 0]).sum(-1).clamp_min(1)
        extent = torch.stack([columns, rows], -1).to(features.dtype)[:, None]  # [B or 1, 1, 2]
        x, y = (torch.arange(side, dtype=features.dtype, device=features.device) for side in (width, height))
        pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        centres.append((pixels + 0.5) / extent)
        embedded.append((pixels + offset) / extent)
        paddings.append(padding.flatten(1))
        ratios.append(torch.cat([extent[..., :1] / width, extent[..., 1:] / height], -1))
    memory = Memory(features, torch.cat(centres, 1), shapes)
    if padding_mask is not None:
        memory = memory._replace(padding=torch.cat(paddings, 1), valid_ratios=torch.cat(ratios, 1))
    return memory, sine_embedding(torch.cat(embedded, 1).flip(-1), features.shape[-1] // 2, temperature)


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
    """Memory -> memory with encoded features; adds one learned embedding a level to the sine embedding."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, config.embed_dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.blocks = Blocks(config)

    def forward(self, memory: Memory, embedding: Tensor) -> Memory:
        rows = zip(self.level_embedding, memory.spatial_shapes, strict=True)
        position = embedding + torch.cat([row.expand(height * width, -1) for row, (height, width) in rows])
        reference = memory.sampling_reference(memory.positions.expand(memory.features.shape[0], -1, -1))
        for layer in self.layers:
            features = self.blocks.run_encoder_layer(layer, memory, position, reference)
            memory = memory._replace(features=features)
        return memory
