"""Inputs of `add_linear` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, to, without_last


def arguments(
    *, batch: int = 2, queries: int = 9, channels: int = 8, outputs: int = 12, positions: int = 1, bias: bool = True,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Normal tokens and positions (of `positions` images)."""
    normal = normals(seed, device)
    return {
        "x": normal(batch, queries, channels, dtype=dtype),
        "position": normal(positions, queries, channels, dtype=dtype),
        "weight": normal(outputs, channels, dtype=dtype, scale=max(channels, 1) ** -0.5),
        "bias": normal(outputs, dtype=dtype) if bias else None,
    }


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "shared position": arguments(dtype=dtype, **sizes),
        "a position of each image, no bias": arguments(dtype=dtype, positions=2, bias=False, **sizes),
    }


SHAPES = {
    "one position": dict(queries=7),
    "a position of each image": dict(batch=3, positions=3, queries=5, outputs=3),
    "more images than chunks": dict(batch=19, queries=2, bias=False),
    "as in a detector": dict(batch=3, queries=100, channels=32),
}
GRADCHECK = (dict(queries=3),)
PER_QUERY = {"x": 1, "position": 1, "output": 1}
EMPTY = empty(arguments, "batch", "queries", "channels", "outputs")
BAD_INPUTS = bad_inputs(
    "add_linear",
    arguments,
    ("no tensor", "bias", constant(0), TypeError, r"bias: expected a tensor, got int"),
    ("2 dimensions", "x", lambda x: x[0], ValueError, r"x: expected shape \[B, N, C\], got \[9, 8\]"),
    ("other N", "position", without_last(1), ValueError, r"position: expected shape \[B or 1, N=9, C=8\], got"),
    (
        "other B",
        "position",
        lambda p: p.expand(3, -1, -1),
        ValueError,
        r"position: expected shape \[B=2 or 1, N=9, C=8\], got \[3, 9, 8\]",
    ),
    ("other C", "weight", without_last(1), ValueError, r"weight: expected shape \[O, C=8\], got \[12, 7\]"),
    ("other O", "bias", without_last(0), ValueError, r"bias: expected shape \[O=12\], got \[11\]"),
    ("other dtype", "position", to(torch.float16), TypeError, r"position: expected dtype torch.float32, got torch.fl"),
    ("elsewhere", "weight", lambda w: w.detach().to("meta"), ValueError, r"weight: expected on cpu like x, got .*meta"),
)
