"""A routing bias that travels where `nn.MultiheadAttention` takes its mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..ops.routed_attention import RoutingFactors, routed_attention
from .self_attention import TorchMultiheadAttention


class RoutedMask(NamedTuple):
    """What stands for `attn_mask`: the factors of the bias, and the mask that there was."""

    routing: RoutingFactors
    attn_mask: torch.Tensor | None  # [N, N] or [B * H, N, N]; bool (True may not attend) or floating (added)


def forward(
    self: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | RoutedMask | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`nn.MultiheadAttention.forward`; with a `RoutedMask`, self-attention with its bias, in one pass."""
    if not isinstance(attn_mask, RoutedMask):
        return type(self).forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    call = TorchMultiheadAttention.call(self, query, key, value, key_padding_mask, need_weights, attn_mask.attn_mask)
    attended = routed_attention(
        call.query, call.key, call.value, attn_mask.routing, attn_mask=call.attn_mask, scale=call.scale
    )
    return call.finish(attended.transpose(1, 2).flatten(2))
