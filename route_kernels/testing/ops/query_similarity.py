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


SHAPES = {  # around tiles of 32 to 256 queries, and around vectors of 2 to 16 lanes
    "one query": dict(queries=1, channels=4),
    "two queries": dict(queries=2, channels=1),
    "31": dict(queries=31, channels=7, batch=1),
    "33": dict(queries=33, channels=16, batch=3),
    "65": dict(queries=65, channels=8),
    "129": dict(queries=129, channels=31),
    "255": dict(queries=255, channels=3),
    "257": dict(queries=257, channels=33, batch=1),
    "600": dict(queries=600, channels=256, batch=1),
    "65, mean": dict(queries=65, channels=8, mode="mean"),
    "257, mean": dict(queries=257, channels=33, batch=1, mode="mean"),
}
SMALL_SHAPES = {  # around tiles of 16 queries and chunks of 16 channels
    "one query": dict(queries=1, channels=4),
    "one channel": dict(queries=15, channels=1),
    "whole tiles": dict(queries=32, channels=16, batch=1),
    "ragged": dict(queries=37, channels=9),
    "several chunks": dict(queries=18, channels=53, batch=3),
}
GRADCHECK = (dict(queries=5, channels=3, mode="mean"),)
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
