"""Sizes of modules, checked where they are given."""

from __future__ import annotations

from ..ops.contract import integer


def expect_positive(module: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if integer(module, name, size) < 1:
            raise ValueError(f"{module}: {name}: expected a positive number, got {size}")


def expect_heads(module: str, embed_dim: int, num_heads: int) -> None:
    expect_positive(module, embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"{module}: embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
