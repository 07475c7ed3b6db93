"""Modules that hold parameters and call the ops; no mathematics of their own.

Parameter names and shapes are those of the public modules, so their checkpoints load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .ops.ms_deform_attn_fused import ms_deform_attn_fused
from .ops.query_similarity import query_similarity
from .ops.routed_attention import RoutingFactors, routed_attention


class QueryRouter(nn.Module):
    """Learned pairwise routing between queries (Route-DETR, arXiv 2512.13876), as factors instead of an N x N bias.

    z = phi(query) gives suppressor and delegator products U(z) V(z)^T / sqrt(rank), scaled by gamma_sup = -softplus(a)
    and gamma_del = softplus(b); x = [similarity, confidence, geometry] gives the gate sigmoid((W_a x_i) . (W_b x_j)).
    x has three entries, so W_a^T W_b is folded into a 3 x 3 matrix and the gate has rank 3, whatever `gate_rank` is.

    Args:
        embed_dim: channels C of a query.
        rank: R of the suppressor and delegator products, and the width of z.
        hidden_dim: hidden width of phi.
        gate_rank: rows of W_a and W_b.
        limit: the bias is clamped to [-limit, limit] (before `strength`); None leaves it.
        nonnegative: softplus on all four factors, so that the suppressor's bias is never positive and the delegator's
            never negative. The paper's form (False) lets either product have either sign.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        rank: int = 16,
        hidden_dim: int = 64,
        gate_rank: int = 32,
        limit: float | None = 5.0,
        nonnegative: bool = False,
    ):
        super().__init__()
        _expect_positive("QueryRouter", embed_dim=embed_dim, rank=rank, hidden_dim=hidden_dim, gate_rank=gate_rank)
        self.rank, self.limit, self.nonnegative = rank, limit, nonnegative
        self.router_phi = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, rank))
        self.router_U_sup = nn.Linear(rank, rank, bias=False)
        self.router_V_sup = nn.Linear(rank, rank, bias=False)
        self.router_U_del = nn.Linear(rank, rank, bias=False)
        self.router_V_del = nn.Linear(rank, rank, bias=False)
        self.selector_a = nn.Linear(3, gate_rank, bias=False)
        self.selector_b = nn.Linear(3, gate_rank, bias=False)
        self.router_gamma_sup = nn.Parameter(torch.tensor(1.0))
        self.router_gamma_del = nn.Parameter(torch.tensor(1.0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, both scales softplus(1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.ones_(self.router_gamma_sup)
        nn.init.ones_(self.router_gamma_del)

    def forward(
        self,
        query: torch.Tensor,
        similarity: torch.Tensor | None = None,
        confidence: torch.Tensor | None = None,
        geometry: torch.Tensor | None = None,
        *,
        strength: float = 1.0,
    ) -> RoutingFactors:
        """The factors of strength * clamp(p gamma_sup D_sup + (1 - p) gamma_del D_del, -limit, limit).

        Args:
            query: [B, N, C], content and position already summed.
            similarity: [B, N], mean similarity to the other queries; None computes `query_similarity(query)`.
            confidence: [B, N], highest class probability of the previous layer; None is 0.
            geometry: [B, N], log of the reference box's area; None is 0.
            strength: lambda > 0; it scales the clamped bias, so it folds into the factors and the limit.

        Returns:
            RoutingFactors with sup_q, sup_k, del_q, del_k [B, N, rank] and gate_q, gate_k [B, N, 3].

        Raises:
            ValueError: strength is negative, or an input has the wrong shape.
        """
        if not strength >= 0:
            raise ValueError(f"QueryRouter: strength: expected a number >= 0, got {strength}")
        if query.dim() != 3:
            raise ValueError(f"QueryRouter: query: expected shape [B, N, C], got {list(query.shape)}")
        if similarity is None:
            similarity = query_similarity(query.detach())
        x = self._gate_input(query, similarity=similarity, confidence=confidence, geometry=geometry)
        return routing_factors(
            self, query, x, rank=self.rank, limit=self.limit, strength=strength, nonnegative=self.nonnegative
        )

    def _gate_input(self, query: torch.Tensor, **features: torch.Tensor | None) -> torch.Tensor:
        columns = []
        for name, feature in features.items():
            if feature is None:
                feature = query.new_zeros(query.shape[:2])
            elif feature.shape != query.shape[:2]:
                raise ValueError(
                    f"QueryRouter: {name}: expected shape [B, N] = {list(query.shape[:2])}, got {list(feature.shape)}"
                )
            columns.append(feature.detach().to(self.selector_a.weight.dtype))
        return torch.stack(columns, dim=-1)


def routing_factors(
    router: nn.Module,
    query: torch.Tensor,
    features: torch.Tensor,
    *,
    rank: int,
    limit: float | None,
    strength: float,
    nonnegative: bool = False,
) -> RoutingFactors:
    """The factors of strength * clamp(p gamma_sup D_sup + (1 - p) gamma_del D_del, -limit, limit) of a router.

    Args:
        router: a `QueryRouter`, or a module with the layers of one.
        query: [B, N, C], content and position already summed.
        features: [B, N, 3], the gate's input, without gradient.
        rank, limit, nonnegative: as `QueryRouter`.
        strength: lambda; it scales what is clamped, so it folds into the factors and the limit.

    Returns:
        RoutingFactors with sup_q, sup_k, del_q, del_k [B, N, rank] and gate_q, gate_k [B, N, 3].
    """
    z = router.router_phi(query)
    factors = [u(z) for u in (router.router_U_sup, router.router_V_sup, router.router_U_del, router.router_V_del)]
    if nonnegative:
        factors = [F.softplus(factor) for factor in factors]
    sup_q, sup_k, del_q, del_k = factors
    dtype = sup_q.dtype
    scale = strength / math.sqrt(rank)
    sup_q = sup_q * (-scale * F.softplus(router.router_gamma_sup)).to(dtype)
    del_q = del_q * (scale * F.softplus(router.router_gamma_del)).to(dtype)
    features = features.to(router.selector_a.weight.dtype)
    gate_q = features @ (router.selector_a.weight.mT @ router.selector_b.weight)  # the matrix is [3, 3]
    limit = None if limit is None else limit * strength
    return RoutingFactors(sup_q, sup_k, del_q, del_k, gate_q.to(dtype), features.to(dtype), limit)


class RoutedSelfAttention(nn.Module):
    """Multi-head self-attention over queries with an optional routing bias; loads an `nn.MultiheadAttention`.

    Args:
        embed_dim: channels C of a query.
        num_heads: H; C must be a multiple of it.

    Raises:
        ValueError: a size is not positive, or embed_dim is no multiple of num_heads.
    """

    def __init__(self, embed_dim: int = 256, num_heads: int = 8):
        super().__init__()
        _expect_heads("RoutedSelfAttention", embed_dim, num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.MultiheadAttention: Xavier-uniform projections, zero biases."""
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
        channels = self.embed_dim
        if query_pos is None:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights, biases = self.in_proj_weight, self.in_proj_bias
            q, k = F.linear(query + query_pos, weights[: 2 * channels], biases[: 2 * channels]).chunk(2, dim=-1)
            v = F.linear(query, weights[2 * channels :], biases[2 * channels :])
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D] views
        attended = routed_attention(q, k, v, routing, attn_mask=attn_mask, key_ranges=key_ranges)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) over the fused op.

    Args:
        embed_dim: channels C.
        num_levels: L feature levels.
        num_heads: H; C must be a multiple of it.
        num_points: P sampling points of a level and head.

    Raises:
        ValueError: a size is not positive, or embed_dim is no multiple of num_heads.
    """

    def __init__(self, embed_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_points: int = 4):
        super().__init__()
        _expect_heads("MSDeformAttn", embed_dim, num_heads)
        _expect_positive("MSDeformAttn", num_levels=num_levels, num_points=num_points)
        self.embed_dim, self.num_levels, self.num_heads, self.num_points = embed_dim, num_levels, num_heads, num_points
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
    ) -> torch.Tensor:
        """Each query samples K = L P positions a head from the feature levels.

        Args:
            query: [B, N, C], content and position already summed.
            reference_points: [B, N, L or 1, 2] as (x, y), or [..., 4] as (cx, cy, w, h), in [0, 1].
            memory: [B, S, C], the levels flattened one after another.
            spatial_shapes: (h, w) of each level: ints, or a tensor [L, 2].
            padding_mask: [B, S] bool, True = padding, counts as zero.

        Returns:
            [B, N, C].

        Raises:
            ValueError: a shape is wrong; the message names the argument.
        """
        value = self.value_proj(memory).unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, -1, 2))
        logits = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        sampled = ms_deform_attn_fused(
            value, spatial_shapes, reference_points, offsets, logits, value_mask=padding_mask
        )
        return self.output_proj(sampled)


def _expect_positive(module: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{module}: {name}: expected a positive number, got {size}")


def _expect_heads(module: str, embed_dim: int, num_heads: int) -> None:
    _expect_positive(module, embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"{module}: embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
