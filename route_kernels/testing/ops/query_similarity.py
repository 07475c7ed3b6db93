"""Inputs of `query_similarity` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, to


def arguments(
    *, batch: int = 2, queries: int = 33, channels: int = 8, mode: str = "relu",
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Queries with a common part, as a decoder's have: cosines around 0.5."""
    normal = normals(seed, device)
    x = normal(batch, queries, channels, dtype=torch.float64) + normal(batch, 1, channels, dtype=torch.float64)
    return {"x": x.detach().to(dtype).requires_grad_(mode == "mean"), "mode": mode}


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {mode: arguments(mode=mode, dtype=dtype, **sizes) for mode in ("relu", "mean")}


EMPTY = empty(arguments, "batch", "queries", "channels")
TINY = dict(batch=2, queries=5, channels=3)
DETECTOR = dict(batch=1, channels=256)
OF_WORKERS = dict(queries=300)
MANY = dict(batch=131_200, queries=64, channels=256)
MANY_GIGABYTES = 10
FLOAT32_UNDER_AUTOCAST = True
BAD_INPUTS = bad_inputs(
    "query_similarity",
    lambda: arguments(queries=5),
    ("no tensor", "x", constant([[1.0]]), TypeError, r"x: expected a tensor, got list"),
    ("2 dimensions", "x", lambda x: x[0], ValueError, r"x: expected shape \[B, N, C\], got \[5, 8\]"),
    ("integers", "x", to(torch.int32), TypeError, r"x: expected dtype .*, got torch.int32"),
    ("none", "mode", constant(None), ValueError, r"mode: expected one of relu, mean, got None"),
    ("unknown", "mode", constant("max"), ValueError, r"mode: expected one of relu, mean, got 'max'"),
)
