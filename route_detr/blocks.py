"""What every transformer layer ends its blocks with: residual and norm, feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class AddNorm(nn.LayerNorm):
    """x, residual [..., C], of one shape -> LayerNorm(residual + x)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(residual + x)


class FeedForward(nn.Sequential):
    """[..., C] -> Linear(hidden), activation ("relu" or "gelu"), Linear(C); Xavier-initialised, biases 0."""

    def __init__(self, dim: int, hidden: int, activation: str = "relu") -> None:
        super().__init__(nn.Linear(dim, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, dim))
        for linear in (self[0], self[2]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
