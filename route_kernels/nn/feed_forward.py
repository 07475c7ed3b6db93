"""The feed-forward block of a transformer layer."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.feed_forward import feed_forward
from .sizes import expect_positive

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
TOKENS_OF_CHUNK = 1024  # fewer make products too small to be fast, and save little


class FeedForward(nn.Sequential):
    """linear, activation, linear: [..., C] -> [..., C]; the parameters are those of an `nn.Sequential` of the three.

    Args:
        dim: channels C.
        hidden_dim: channels of the hidden layer.
        activation: "relu", "gelu" or "silu".
        chunks: the hidden layer is computed again in backward and not kept, in this many parts of the tokens, or,
            not compiled, in fewer of about `TOKENS_OF_CHUNK`; None keeps it.

    Raises:
        ValueError: a size is not positive, or the activation is unknown.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str = "relu", chunks: int | None = 8):
        expect_positive("FeedForward", dim=dim, hidden_dim=hidden_dim, **({} if chunks is None else {"chunks": chunks}))
        if activation not in ACTIVATIONS:
            raise ValueError(f"FeedForward: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        super().__init__(nn.Linear(dim, hidden_dim), ACTIVATIONS[activation](), nn.Linear(hidden_dim, dim))
        self.activation, self.chunks = activation, chunks
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for linear in (self[0], self[2]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.chunks is None:
            return super().forward(x)
        first, _, last = self
        chunks = self.chunks
        if not torch.compiler.is_compiling():  # a number that follows the size would be a graph for each
            tokens = x.shape[:-1].numel()
            chunks = min(chunks, max((tokens + TOKENS_OF_CHUNK // 2) // TOKENS_OF_CHUNK, 1))
        return feed_forward(x, first.weight, first.bias, last.weight, last.bias, self.activation, chunks)
