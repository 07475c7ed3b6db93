"""Inputs of `feed_forward` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, no_integers, to, without_last


def arguments(
    *, batch: int = 2, queries: int = 9, channels: int = 8, hidden: int = 16, activation: str = "relu", chunks: int = 4,
    biases: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Normal tokens; weights that keep their size, as an initialised layer's do."""
    normal = normals(seed, device)
    return {
        "x": normal(batch, queries, channels, dtype=dtype),
        "w1": normal(hidden, channels, dtype=dtype, scale=max(channels, 1) ** -0.5),
        "b1": normal(hidden, dtype=dtype, scale=0.5) if biases else None,
        "w2": normal(channels, hidden, dtype=dtype, scale=max(hidden, 1) ** -0.5),
        "b2": normal(channels, dtype=dtype, scale=0.5) if biases else None,
        "activation": activation,
        "chunks": chunks,
    }


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "relu": arguments(dtype=dtype, **sizes),
        "gelu, no biases": arguments(dtype=dtype, activation="gelu", biases=False, **sizes),
    }


SHAPES = {
    "one token": dict(batch=1, queries=1),
    "fewer tokens than chunks": dict(batch=1, queries=3, chunks=8),
    "a last chunk of one": dict(batch=1, queries=9, chunks=4),
    "gelu": dict(queries=17, activation="gelu", channels=5, hidden=23, chunks=3),
    "silu, no biases": dict(queries=17, activation="silu", biases=False),
    "as in a detector": dict(queries=200, channels=64, hidden=256, chunks=8),
}
GRADCHECK = tuple(dict(queries=3, channels=4, hidden=6, activation=name) for name in ("relu", "gelu", "silu"))
PER_QUERY = {"x": 1, "output": 1}
EMPTY = empty(arguments, "batch", "queries", "channels", "hidden")
EMPTY["outputs"] = lambda: {
    name: argument.detach()[:0].requires_grad_() if name in ("w2", "b2") else argument
    for name, argument in arguments().items()
}
BAD_INPUTS = bad_inputs(
    "feed_forward",
    arguments,
    *no_integers("chunks"),
    ("a list", "activation", constant(["relu"]), ValueError, r"activation: expected one of .*, got \['relu'\]"),
    ("none", "activation", constant(None), ValueError, r"activation: expected one of relu, gelu, silu, got None"),
    ("negative", "chunks", constant(-3), ValueError, r"chunks: expected a number >= 1, got -3"),
    ("no tensor", "x", constant(1.0), TypeError, r"x: expected a tensor, got float"),
    ("no dimensions", "x", lambda x: x[0, 0, 0], ValueError, r"x: expected shape \[..., C\], got \[\]"),
    ("no tensor", "w2", constant(None), TypeError, r"w2: expected a tensor, got NoneType"),
    ("other C", "w1", without_last(1), ValueError, r"w1: expected shape \[F, C=8\], got \[16, 7\]"),
    ("other F", "w2", without_last(1), ValueError, r"w2: expected shape \[O, F=16\], got \[8, 15\]"),
    ("other F", "b1", without_last(0), ValueError, r"b1: expected shape \[F=16\], got \[15\]"),
    ("other O", "b2", without_last(0), ValueError, r"b2: expected shape \[O=8\], got \[7\]"),
    ("integers", "x", to(torch.int64), TypeError, r"x: expected dtype .*float32.*, got torch.int64"),
    ("other dtype", "w1", to(torch.bfloat16), TypeError, r"w1: expected dtype torch.float32, got torch.bfloat16"),
    ("other dtype", "b2", to(torch.float64), TypeError, r"b2: expected dtype torch.float32, got torch.float64"),
    ("unknown", "activation", constant("tanh"), ValueError, r"activation: expected one of relu, gelu, silu, got 'ta"),
    ("none", "chunks", constant(0), ValueError, r"chunks: expected a number >= 1, got 0"),
    ("elsewhere", "w2", lambda w: w.detach().to("meta"), ValueError, r"w2: expected on cpu like x, got one on meta"),
)
