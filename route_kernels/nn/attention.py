"""Self-attention with a routing bias, and multi-scale deformable attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.add_linear import add_linear
from ..ops.ms_deform_attn import autocast_value
from ..ops.ms_deform_attn_fused import ms_deform_attn_fused
from ..ops.routed_attention import RoutingFactors, routed_attention
from ..recompute import recomputed
from .sizes import expect_heads, expect_positive


class RoutedSelfAttention(nn.Module):
    """Multi-head self-attention over queries with an optional routing bias; loads an `nn.MultiheadAttention`.

    Args:
        embed_dim: channels C of a query.
        num_heads: H; C must be a multiple of it.
        recompute: q, k and v are projected again in backward and not kept.

    Raises:
        ValueError: a size is not positive, or embed_dim is no multiple of num_heads.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, recompute: bool = False):
        super().__init__()
        expect_heads("RoutedSelfAttention", embed_dim, num_heads)
        self.embed_dim, self.num_heads, self.recompute = embed_dim, num_heads, recompute
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as nn.MultiheadAttention does: Xavier-uniform projections, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        query_pos: torch.Tensor | None = None,
        routing: RoutingFactors | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        key_ranges: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the queries to each other: q and k from query + query_pos, v from query.

        Args:
            query: [B, N, C].
            query_pos: [B, N, C] or None.
            routing: factors of the bias, or None for plain attention.
            attn_mask, key_ranges: as `routed_attention`. True means "may attend" (the opposite of
                `nn.MultiheadAttention`).

        Returns:
            [B, N, C], without residual and norm.

        Raises:
            ValueError: query is not [B, N, C].
        """
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"RoutedSelfAttention: query: expected shape [B, N, C={self.embed_dim}], got {list(query.shape)}"
            )
        inputs = (query, query_pos, routing, attn_mask, key_ranges)
        attended = recomputed(self._attended, *inputs) if self.recompute else self._attended(*inputs)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _attended(self, query, query_pos, routing, attn_mask, key_ranges) -> torch.Tensor:
        """[B, H, N, D]: the projections in and the attention."""
        channels = self.embed_dim
        if query_pos is None:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weight_qk, weight_v = self.in_proj_weight.split([2 * channels, channels])
            bias_qk, bias_v = self.in_proj_bias.split([2 * channels, channels])
            q, k = add_linear(query, query_pos, weight_qk, bias_qk).chunk(2, dim=-1)
            v = F.linear(query, weight_v, bias_v)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D] views
        return routed_attention(q, k, v, routing, attn_mask=attn_mask, key_ranges=key_ranges)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) over the fused op.

    Args:
        embed_dim: channels C.
        num_levels: L feature levels.
        num_heads: H; C must be a multiple of it.
        num_points: P sampling points of a level and head.
        recompute: value, offsets and logits are projected again in backward and not kept; the sampling is not.
        recast: under autocast memory is cast again in backward, and its copy is not kept; no product is repeated.

    Raises:
        ValueError: a size is not positive, or embed_dim is no multiple of num_heads.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        recompute: bool = False,
        recast: bool = False,
    ):
        super().__init__()
        expect_heads("MSDeformAttn", embed_dim, num_heads)
        expect_positive("MSDeformAttn", num_levels=num_levels, num_points=num_points)
        self.embed_dim, self.num_levels, self.num_heads, self.num_points = embed_dim, num_levels, num_heads, num_points
        self.recompute, self.recast = recompute, recast
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, 2 * samples)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head h looks along the angle 2 pi h / H, point p at p + 1 pixels; weights uniform (Deformable DETR)."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        grid = direction[:, None, None, :] * distance[None, None, :, None]  # [H, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: torch.Tensor,
        reference_points: torch.Tensor,
        memory: torch.Tensor,
        spatial_shapes: Sequence[tuple[int, int]] | torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        query_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each query samples K = L P positions a head from the feature levels.

        Args:
            query: [B, N, C], content and position already summed, or the content alone.
            reference_points: [B, N, L or 1, 2] as (x, y), or [..., 4] as (cx, cy, w, h), in [0, 1].
            memory: [B, S, C], the levels flattened one after another.
            spatial_shapes: (h, w) of each level: ints, or a tensor [L, 2].
            padding_mask: [B, S] bool, True = padding, counts as zero.
            query_pos: [B or 1, N, C], added to query for offsets and weights; the sum is not kept for backward.

        Returns:
            [B, N, C].

        Raises:
            ValueError: a shape is wrong; the message names the argument.
        """
        inputs = (query, query_pos, reference_points, memory, spatial_shapes, padding_mask)
        return self.output_proj(recomputed(self._sampled, *inputs) if self.recompute else self._sampled(*inputs))

    def _sampled(self, query, query_pos, reference_points, memory, spatial_shapes, padding_mask) -> torch.Tensor:
        """[B, N, C]: the projections in and the sampling."""
        value = recomputed(self.value_proj, memory, kept=()) if self.recast else self.value_proj(memory)
        value = value.unflatten(-1, (self.num_heads, -1))
        query = autocast_value(query) if query_pos is None else query  # one copy for both projections
        offsets = _projected(self.sampling_offsets, query, query_pos).unflatten(-1, (self.num_heads, -1, 2))
        logits = _projected(self.attention_weights, query, query_pos).unflatten(-1, (self.num_heads, -1))
        return ms_deform_attn_fused(value, spatial_shapes, reference_points, offsets, logits, value_mask=padding_mask)


def _projected(linear: nn.Linear, x: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    return linear(x) if position is None else add_linear(x, position, linear.weight, linear.bias)
