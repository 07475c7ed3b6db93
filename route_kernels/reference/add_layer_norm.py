"""Residual sum and LayerNorm (arXiv 1607.06450)."""

from __future__ import annotations

import torch

from ..precision import accumulate_dtype, without_autocast


def add_layer_norm(
    x: torch.Tensor,  # [..., C]
    residual: torch.Tensor,  # [..., C]
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = weight (s - mean s) / sqrt(var s + eps) + bias, s = x + residual, in `dtype`: [..., C]."""
    accumulate = accumulate_dtype(dtype)
    with without_autocast(x.device):
        s = x.to(accumulate) + residual.to(accumulate)
        centred = s - s.mean(-1, keepdim=True)
        normalized = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        return (normalized * weight.to(accumulate) + bias.to(accumulate)).to(dtype)
