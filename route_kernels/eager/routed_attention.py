"""Routed attention (arXiv 2512.13876) as `scaled_dot_product_attention` with an additive mask."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def routed_attention(
    query: torch.Tensor,  # [B, H, N, D]
    key: torch.Tensor,  # [B, H, M, D]
    value: torch.Tensor,  # [B, H, M, D]
    routing: tuple | None,  # sup_q, sup_k, del_q, del_k, gate_q, gate_k: [B, N or M, R or G]; limit, strength
    attn_mask: torch.Tensor | None,  # broadcastable to [B, H, N, M]
    key_ranges: torch.Tensor | None,  # [N, 2, 2] or [B, N, 2, 2]
    scale: float,
) -> torch.Tensor:
    """softmax(scale q k^T + bias + mask) v, bias and masks written out as one mask: [B, H, N, D]."""
    mask, visible = None, None
    if routing is not None:
        sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit, strength = routing
        p = torch.sigmoid(gate_q @ gate_k.mT)
        r = p * (sup_q @ sup_k.mT) + (1 - p) * (del_q @ del_k.mT)  # [B, N, M]
        if isinstance(limit, torch.Tensor):
            limit = limit.to(r.dtype)
        elif limit is not None:
            limit = min(limit, torch.finfo(r.dtype).max)
        if limit is not None:
            r = r.clamp(-limit, limit)
        if isinstance(strength, torch.Tensor) or strength != 1:
            r = strength * r
        mask = r.unsqueeze(1).to(query.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = torch.atleast_2d(attn_mask)
    elif attn_mask is not None:
        added = torch.atleast_2d(attn_mask).to(query.dtype)
        mask = added if mask is None else mask + added
    if key_ranges is not None:
        j = torch.arange(key.shape[2], device=key.device)
        start, end = key_ranges.unsqueeze(-1).unbind(-2)  # [..., N, 2, 1]
        in_range = ((start <= j) & (j < end)).any(dim=-2).unsqueeze(-3)  # [B or none, 1, N, M]
        visible = in_range if visible is None else visible & in_range
    if visible is not None:
        mask = visible if mask is None else mask.masked_fill(~visible, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
