"""LayerNorm of a residual sum."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.add_layer_norm import KEEP, add_layer_norm
from ..ops.contract import expect_choice


class AddLayerNorm(nn.LayerNorm):
    """norm(x + residual): the parameters of an `nn.LayerNorm` over the last dimension.

    Args:
        dim: channels C.
        eps: added to the variance.
        keep: as `add_layer_norm`.

    Raises:
        ValueError: keep is unknown.
    """

    def __init__(self, dim: int, eps: float = 1e-5, keep: str = "output"):
        expect_choice("AddLayerNorm", "keep", keep, KEEP)
        super().__init__(dim, eps)
        self.keep = keep

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[..., C] of two tensors [..., C]."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, keep=self.keep)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep!r}"
