"""Attention as PyTorch alone has it: every intermediate written out and kept for backward.

Memory level `none`, and the base of the public formulation (`public_form.py`). Results are those of the fused modules
to rounding; parameters are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from route_kernels.nn import MSDeformAttn, RoutedSelfAttention
from route_kernels.ops.routed_attention import RoutingFactors
from route_kernels.reference.routed_attention import routing_bias, visible_keys
from route_kernels.testing import EAGER

Sampling = Callable[[Tensor, Sequence[tuple[int, int]], None, Tensor, Tensor], Tensor]


def make_eager(model: nn.Module, sample: Sampling = EAGER["ms_deform_attn"]) -> None:
    """Change the forwards of a model's attention modules, in place.

    sample: value [B, S, H, D], spatial shapes, None, locations [B, N, H, L, P, 2], weights [B, N, H, L, P] ->
        [B, N, H D]; float32 at least.
    """
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.forward = partial(_deformable_attention, module, sample)
        elif isinstance(module, RoutedSelfAttention):
            module.forward = partial(_self_attention, module)


def _deformable_attention(
    self: MSDeformAttn,
    sample: Sampling,
    query: Tensor,  # [B, N, C]
    reference_points: Tensor,  # [B, N, L or 1, 2 or 4]
    memory: Tensor,  # [B, S, C]
    spatial_shapes: Sequence[tuple[int, int]],
    padding_mask: Tensor | None = None,  # [B, S]
    query_pos: Tensor | None = None,  # [B or 1, N, C]
) -> Tensor:
    query = query if query_pos is None else query + query_pos
    value, points = self.value_proj(memory), self.num_points
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None], 0.0)
    offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, -1, points, 2))
    weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
    reference = reference_points[:, :, None, :, None]  # [B, N, 1, L or 1, 1, 2 or 4]
    if reference.shape[-1] == 2:
        sizes = reference.new_tensor([(width, height) for height, width in spatial_shapes])
        locations = reference + offsets / sizes[:, None]
    else:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    precise = torch.promote_types(value.dtype, torch.float32)
    heads = value.unflatten(-1, (self.num_heads, -1)).to(precise)
    with torch.autocast(value.device.type, enabled=False):
        weights = weights.to(precise).unflatten(-1, (-1, points))
        sampled = sample(heads, spatial_shapes, None, locations.to(precise), weights)
    return self.output_proj(sampled.to(value.dtype))


def _self_attention(
    self: RoutedSelfAttention,
    query: Tensor,  # [B, N, C]
    query_pos: Tensor | None = None,  # [B, N, C]
    routing: RoutingFactors | None = None,
    *,
    key_ranges: Tensor | None = None,  # [B, N, 2, 2]
) -> Tensor:
    """`nn.MultiheadAttention` with the bias, and what a query may not see, as one additive mask [B H, N, N]."""
    mask = None if routing is None else routing_bias(routing).repeat_interleave(self.num_heads, 0)
    if key_ranges is not None:
        hidden = ~visible_keys(key_ranges, query.shape[1]).repeat_interleave(self.num_heads, 0)
        mask = (query.new_zeros(hidden.shape) if mask is None else mask).masked_fill(hidden, -torch.inf)
    placed = (query if query_pos is None else query + query_pos).transpose(0, 1)
    attended, _ = functional.multi_head_attention_forward(
        placed, placed, query.transpose(0, 1), self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias,
        None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias, need_weights=False, attn_mask=mask,
    )  # fmt: skip
    return attended.transpose(0, 1)
