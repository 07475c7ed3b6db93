"""Routed attention (Route-DETR, arXiv 2512.13876), every tensor of N x M elements written out.

Dimensions: B batch, H heads, N queries, M keys, D channels of one head, R rank of a product, G rank of the gate.
float16 and bfloat16 inputs are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import torch

from ..precision import accumulate_dtype, without_autocast


def routing_bias(
    routing: tuple,  # sup_q, sup_k, del_q, del_k, gate_q, gate_k: [B, N or M, R or G]; limit, strength
) -> torch.Tensor:
    """b_ij = strength clamp(p_ij sup_ij + (1 - p_ij) del_ij, -limit, limit), p_ij = sigmoid(gate_ij): [B, N, M]."""
    sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit, strength = routing
    p = torch.sigmoid(gate_q @ gate_k.mT)
    r = p * (sup_q @ sup_k.mT) + (1 - p) * (del_q @ del_k.mT)
    if isinstance(limit, torch.Tensor):
        limit = limit.to(r.dtype)
    b = r if limit is None else r.clamp(-limit, limit)
    return strength * b if isinstance(strength, torch.Tensor) or strength != 1 else b


def visible_keys(key_ranges: torch.Tensor, keys: int) -> torch.Tensor:
    """[N, 2, 2] or [B, N, 2, 2] half-open intervals -> bool [..., N, M]: j is in one of a query's two intervals."""
    j = torch.arange(keys, device=key_ranges.device)
    start, end = key_ranges[..., 0, None], key_ranges[..., 1, None]  # [..., N, 2, 1]
    return ((start <= j) & (j < end)).any(dim=-2)


def _finite_stays_finite(attn_mask: torch.Tensor, accumulate: torch.dtype) -> torch.Tensor:
    """A float64 mask's own finfo.min is the lowest number of float32, not -inf, which would hide the key."""
    wide = attn_mask.to(torch.promote_types(attn_mask.dtype, accumulate))
    return wide.clamp(min=torch.finfo(accumulate).min).masked_fill(wide == -torch.inf, -torch.inf).to(accumulate)


def routed_attention(
    query: torch.Tensor,  # [B, H, N, D]
    key: torch.Tensor,  # [B, H, M, D]
    value: torch.Tensor,  # [B, H, M, D]
    routing: tuple | None,  # six factors, limit and strength
    attn_mask: torch.Tensor | None,
    key_ranges: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """O_hi = sum_j softmax_j(scale q_hi . k_hj + b_ij + mask_ij) v_hj: [B, H, N, D]; no key to attend gives 0."""
    dtype, accumulate = query.dtype, accumulate_dtype(query.dtype)
    with without_autocast(query.device):
        query, key, value = (x.to(accumulate) for x in (query, key, value))
        logits = scale * (query @ key.mT)
        if routing is not None:
            logits = logits + routing_bias((*(x.to(accumulate) for x in routing[:6]), *routing[6:])).unsqueeze(1)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            logits = logits + _finite_stays_finite(attn_mask, accumulate)
        elif attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        if key_ranges is not None:
            visible = visible_keys(key_ranges, key.shape[-2])
            visible = visible.unsqueeze(-3)  # one for all heads
            logits = logits.masked_fill(~visible, -torch.inf)
        nothing_to_attend = (logits == -torch.inf).all(dim=-1, keepdim=True)
        probabilities = torch.softmax(logits.masked_fill(nothing_to_attend, 0.0), dim=-1)
        return (probabilities.masked_fill(nothing_to_attend, 0.0) @ value).to(dtype)
