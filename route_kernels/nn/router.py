"""Learned pairwise routing between queries."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.query_similarity import query_similarity
from ..ops.routed_attention import RoutingFactors
from .sizes import expect_positive


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
        expect_positive("QueryRouter", embed_dim=embed_dim, rank=rank, hidden_dim=hidden_dim, gate_rank=gate_rank)
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
        strength: float | torch.Tensor = 1.0,
    ) -> RoutingFactors:
        """The factors of strength * clamp(p gamma_sup D_sup + (1 - p) gamma_del D_del, -limit, limit).

        Args:
            query: [B, N, C], content and position already summed.
            similarity: [B, N], mean similarity to the other queries; None computes `query_similarity(query)`.
            confidence: [B, N], highest class probability of the previous layer; None is 0.
            geometry: [B, N], log of the reference box's area; None is 0.
            strength: lambda >= 0, which scales the clamped bias. A number is folded into the factors and the limit; a
                tensor without dimensions is the strength of the result, and may have a gradient.

        Returns:
            RoutingFactors with sup_q, sup_k, del_q, del_k [B, N, rank] and gate_q, gate_k [B, N, 3].

        Raises:
            ValueError: strength is negative, or an input has the wrong shape.
        """
        if not isinstance(strength, torch.Tensor) and not strength >= 0:
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
    strength: float | torch.Tensor,
    nonnegative: bool = False,
) -> RoutingFactors:
    """The factors of strength * clamp(p gamma_sup D_sup + (1 - p) gamma_del D_del, -limit, limit) of a router.

    Args:
        router: a `QueryRouter`, or a module with the layers of one.
        query: [B, N, C], content and position already summed.
        features: [B, N, 3], the gate's input, without gradient.
        rank, limit, nonnegative: as `QueryRouter`.
        strength: lambda; a number scales what is clamped and the limit, a tensor is handed on.

    Returns:
        RoutingFactors with sup_q, sup_k, del_q, del_k [B, N, rank] and gate_q, gate_k [B, N, 3].
    """
    z = router.router_phi(query)
    factors = [u(z) for u in (router.router_U_sup, router.router_V_sup, router.router_U_del, router.router_V_del)]
    if nonnegative:
        factors = [F.softplus(factor) for factor in factors]
    sup_q, sup_k, del_q, del_k = factors
    dtype = sup_q.dtype
    folded, strength = (1.0, strength) if isinstance(strength, torch.Tensor) else (strength, 1.0)
    scale = folded / math.sqrt(rank)
    sup_q = sup_q * (-scale * F.softplus(router.router_gamma_sup)).to(dtype)
    del_q = del_q * (scale * F.softplus(router.router_gamma_del)).to(dtype)
    features = features.to(router.selector_a.weight.dtype)
    gate_q = features @ (router.selector_a.weight.mT @ router.selector_b.weight)  # the matrix is [3, 3]
    limit = None if limit is None else limit * folded
    return RoutingFactors(sup_q, sup_k, del_q, del_k, gate_q.to(dtype), features.to(dtype), limit, strength)
