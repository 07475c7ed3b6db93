"""The formulas of the ops in PyTorch's own operators, in the dtypes of the inputs: how accurate eager PyTorch is.

Unlike the reference nothing is upcast, and the attention itself is `scaled_dot_product_attention` or `grid_sample`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..ops.levels import flat_integers, flat_spatial_shapes, level_pairs, level_starts
from ..reference.routed_attention import visible_keys


def routed_attention(query, key, value, routing=None, *, attn_mask=None, key_ranges=None, scale=None) -> torch.Tensor:
    """`scaled_dot_product_attention` over a bias [B, 1, N, M] that is written out."""
    bias = query.new_zeros(query.shape[0], 1, query.shape[2], key.shape[2])
    if routing is not None:
        p = torch.sigmoid(routing.gate_q @ routing.gate_k.mT)
        r = p * (routing.sup_q @ routing.sup_k.mT) + (1 - p) * (routing.del_q @ routing.del_k.mT)
        limit = torch.finfo(r.dtype).max if routing.limit is None else min(routing.limit, torch.finfo(r.dtype).max)
        bias = r.clamp(-limit, limit).unsqueeze(1).to(query.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = bias.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        bias = bias + attn_mask.to(query.dtype)
    if key_ranges is not None:
        bias = bias.masked_fill(~visible_keys(key_ranges, key.shape[2]).unsqueeze(-3), -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def query_similarity(x, mode="relu") -> torch.Tensor:
    """The [B, N, N] cosines, written out."""
    unit = F.normalize(x, dim=-1, eps=1e-12 if x.dtype != torch.float16 else 1e-6)
    cosine = unit @ unit.mT
    others = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    if mode == "mean":
        return (cosine * others).sum(dim=-1) / max(x.shape[1] - 1, 1)
    return (cosine.relu() * others).sum(dim=-1).detach() / max(x.shape[1], 1)


def ms_deform_attn(
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, *, points=None
) -> torch.Tensor:
    """`grid_sample` level by level, as the public modules do it where no kernel is built."""
    if points is None:
        locations, weights = sampling_locations.unbind(3), attention_weights.unbind(3)
    else:
        locations, weights = sampling_locations.split(points, dim=3), attention_weights.split(points, dim=3)
    return _sampled(value, spatial_shapes, level_start_index, locations, weights)


def ms_deform_attn_fused(
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits, *, points=None, value_mask=None
) -> torch.Tensor:
    """Softmax, location arithmetic and `grid_sample`, one after the other."""
    if value_mask is not None:
        value = value.masked_fill(value_mask[:, :, None, None], 0)
    pairs = level_pairs(flat_spatial_shapes("ms_deform_attn_fused", spatial_shapes))
    total = attention_logits.shape[-1]
    points = (total // len(pairs),) * len(pairs) if points is None else tuple(points)
    weights = attention_logits.softmax(dim=-1).split(points, dim=3)
    references = reference_points.expand(-1, -1, len(pairs), -1).unbind(2)
    locations = []
    for (height, width), count, reference, offsets in zip(
        pairs, points, references, sampling_offsets.split(points, dim=3), strict=True
    ):
        reference = reference[:, :, None, None]
        if reference.shape[-1] == 2:
            x, y = offsets.unbind(-1)
            locations.append(reference + torch.stack([x / max(width, 1), y / max(height, 1)], dim=-1))
        else:
            locations.append(reference[..., :2] + offsets / count * reference[..., 2:] * 0.5)
    return _sampled(value, spatial_shapes, None, locations, weights)


def _sampled(value, spatial_shapes, level_start_index, locations, weights) -> torch.Tensor:
    sizes = flat_spatial_shapes("ms_deform_attn", spatial_shapes)
    starts = level_starts(sizes, flat_integers("ms_deform_attn", "level_start_index", level_start_index))
    batch, _, heads, channels = value.shape
    queries = locations[0].shape[1]
    output = value.new_zeros(batch * heads, channels, queries)
    for (height, width), start, location, weight in zip(level_pairs(sizes), starts, locations, weights, strict=True):
        level = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1).to(value.dtype)  # [B H, N, P, 2]
        sampled = F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (sampled * weight.transpose(1, 2).flatten(0, 1).unsqueeze(1).to(value.dtype)).sum(dim=-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def feed_forward(x, w1, b1, w2, b2, activation="relu", chunks=8) -> torch.Tensor:
    """Linear, activation, linear."""
    return F.linear(getattr(F, activation)(F.linear(x, w1, b1)), w2, b2)


def add_linear(x, position, weight, bias=None) -> torch.Tensor:
    """A sum and a linear layer."""
    return F.linear(x + position, weight, bias)


def add_layer_norm(x, residual, weight, bias, eps=1e-5, *, keep="output") -> torch.Tensor:
    """A sum and a layer norm."""
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)


def sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, weight=None, *, reduction="sum") -> torch.Tensor:
    """As the public detectors have it, with one-hot targets."""
    truth = (targets[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p_t = p * truth + (1 - p) * (1 - truth)
    alpha_t = alpha * truth + (1 - alpha) * (1 - truth)
    loss = (alpha_t * cross_entropy * (1 - p_t) ** gamma).sum(-1)
    loss = loss if weight is None else loss * weight.to(loss.dtype)
    return loss.sum() if reduction == "sum" else loss


EAGER = {
    "routed_attention": routed_attention,
    "query_similarity": query_similarity,
    "ms_deform_attn": ms_deform_attn,
    "ms_deform_attn_fused": ms_deform_attn_fused,
    "feed_forward": feed_forward,
    "add_linear": add_linear,
    "add_layer_norm": add_layer_norm,
    "sigmoid_focal_loss": sigmoid_focal_loss,
}
