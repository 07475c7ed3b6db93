"""Two models of research code, in their names and calling conventions: what `codebases.py` trains a step of.

Their modules are those that the tests of the integrations are made with (`research_modules.py`).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import research_modules as published

Shapes = list[tuple[int, int]]
STRENGTH = 0.3  # lambda at the end of its schedule


class MSDeformAttn(published.MSDeformAttn):
    """The module of Mask2Former and others: the extension if it is there, else `grid_sample`."""

    def sample(self, value, shapes, starts, locations, weights):
        if published.EXTENSION in sys.modules:
            return super().sample(value, shapes, starts, locations, weights)
        return published.grid_samples(value, shapes, locations, weights)


class FeedForward(nn.Module):
    """Linear, ReLU, linear, and the norm of their sum with the input."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class EncoderLayer(nn.Module):
    """Deformable self-attention of the feature positions, feed-forward network."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.self_attn, self.norm1 = MSDeformAttn(channels), nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: Tensor, starts: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, reference, x, shapes, starts))
        return self.feed_forward(x)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable cross-attention, feed-forward network."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.self_attn, self.norm2 = nn.MultiheadAttention(channels, 8, batch_first=True), nn.LayerNorm(channels)
        self.cross_attn, self.norm1 = MSDeformAttn(channels), nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, shapes: Tensor, starts: Tensor
    ) -> Tensor:
        placed = x + position
        x = self.norm2(x + self.self_attn(placed, placed, x, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + position, reference, memory, shapes, starts))
        return self.feed_forward(x)


class DeformableTransformer(nn.Module):
    """Deformable-DETR (arXiv 2010.04159) behind its backbone, one-stage: projections, encoder, decoder, heads, loss.

    The loss takes the targets of all queries as given: nothing is matched.
    """

    def __init__(
        self, *, queries: int = 300, classes: int = 91, layers: int = 6, channels: int = 256, hidden: int = 1024
    ) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in (512, 1024, 2048, 2048))
        self.level_embed = nn.Parameter(torch.randn(4, channels))
        self.encoder = nn.ModuleList(EncoderLayer(channels, hidden) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(channels, hidden) for _ in range(layers))
        self.query_embed = nn.Embedding(queries, 2 * channels)
        self.reference_points = nn.Linear(channels, 2)
        self.class_embed, self.bbox_embed = nn.Linear(channels, classes), nn.Linear(channels, 4)

    def forward(self, features: list[Tensor], labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """The loss of features [B, C_l, h_l, w_l], labels [B, N] and boxes [B, N, 4]."""
        batch = len(labels)
        shapes = torch.tensor([feature.shape[-2:] for feature in features])
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        memory = torch.cat([project(x).flatten(2).mT for project, x in zip(self.input_proj, features, strict=True)], 1)
        position = self.level_embed.repeat_interleave(shapes.prod(1), 0)
        reference = centres(shapes.tolist())[:, None].expand(batch, -1, 4, -1)
        for layer in self.encoder:
            memory = layer(memory, position, reference, shapes, starts)

        position, x = self.query_embed.weight.expand(batch, -1, -1).chunk(2, -1)
        reference = self.reference_points(position).sigmoid()[:, :, None].expand(-1, -1, 4, -1)
        loss = x.new_zeros(())
        for layer in self.decoder:
            x = layer(x, position, reference, memory, shapes, starts)
            loss = loss + F.cross_entropy(self.class_embed(x).flatten(0, 1), labels.flatten())
            loss = loss + F.l1_loss(self.bbox_embed(x).sigmoid(), boxes)
        return {"loss": loss}


def centres(shapes: Shapes) -> Tensor:
    """[S, 2]: the centre of every feature position as (x, y), level after level."""
    grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    return torch.cat(grids).flip(-1)


class RoutedDecoder(nn.Module):
    """The decoder of Dual-R-DETR (arXiv 2512.13876) in its auxiliary branch: 6 layers, the last 2 of them routed."""

    def __init__(self, *, queries: int = 900, classes: int = 91, layers: int = 6, channels: int = 256) -> None:
        super().__init__()
        self.enc_output = nn.Linear(channels, channels)
        self.query_embed = nn.Embedding(queries, 2 * channels)
        self.decoder = published.Decoder(layers, classes, embed_dim=channels, d_ffn=2048)
        self.decoder.gating_lambda = STRENGTH

    def forward(self, memory: Tensor, boxes: Tensor, shapes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of memory [B, S, C], boxes [B, N, 4], shapes [L, 2] and labels [B, N]."""
        x, position = self.query_embed.weight.expand(len(memory), -1, -1).chunk(2, -1)
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        logits = self.decoder(x, position, boxes, self.enc_output(memory), shapes, starts)
        loss = sum(F.cross_entropy(each.flatten(0, 1), labels.flatten()) for each in logits)
        return {"loss": loss}


def provide_bricks() -> None:
    """`models.bricks.ms_deform_attn` without a compiled extension, as it is imported on a machine without a GPU."""
    if published.BRICKS not in sys.modules:
        sys.modules.update(published.bricks_module())
