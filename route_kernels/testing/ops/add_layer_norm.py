"""Inputs of `add_layer_norm` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, no_numbers, to, without_last


def arguments(
    *, batch: int = 2, queries: int = 9, channels: int = 24, zeros: int = 0, keep: str = "output",
    dtype: torch.dtype = torch.float32, residual_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """A normal residual, a smaller change to it, and weights around 1 as of a trained model; `zeros` of them are 0."""
    normal = normals(seed, device)
    parameter_dtype = dtype if parameter_dtype is None else parameter_dtype
    weight = 1 + 0.3 * normal(channels, dtype=torch.float64).detach()
    weight[:zeros] = 0
    return {
        "x": normal(batch, queries, channels, dtype=dtype, scale=0.5),
        "residual": normal(batch, queries, channels, dtype=dtype if residual_dtype is None else residual_dtype),
        "weight": weight.to(device, parameter_dtype).requires_grad_(),
        "bias": normal(channels, dtype=parameter_dtype, scale=0.3),
        "keep": keep,
    }


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "zero weights": arguments(dtype=dtype, zeros=4, **sizes),
        "normalized": arguments(dtype=dtype, zeros=9, keep="normalized", **sizes),
    }


SHAPES = {  # around vectors of 2 to 16 lanes, and parts of 64 tokens
    "one token": dict(batch=1, queries=1, channels=16),
    "one channel": dict(queries=5, channels=1),
    "as many channels as are kept": dict(queries=3, channels=4),
    "7": dict(queries=63, channels=7, zeros=1),
    "odd": dict(batch=3, queries=65, channels=33, zeros=2),
    "256": dict(queries=130, channels=256, zeros=4),
    "1000": dict(batch=1, queries=9, channels=1000),
    "all lost, normalized": dict(queries=70, channels=40, zeros=40, keep="normalized"),
}
SMALL_SHAPES = {  # around tiles of 256 elements, and parts of 64 tokens
    "one token": dict(batch=1, queries=1, channels=16),
    "one channel": dict(queries=5, channels=1),
    "as many channels as are kept": dict(queries=3, channels=4, zeros=2),
    "several tokens a tile": dict(queries=7, channels=8, zeros=4),
    "odd, two parts": dict(batch=1, queries=65, channels=17, zeros=2),
    "wider than a tile": dict(batch=1, queries=3, channels=260),
    "all lost, normalized": dict(queries=5, channels=10, zeros=10, keep="normalized"),
}
GRADCHECK = tuple(dict(queries=3, channels=6, zeros=2, keep=keep) for keep in ("output", "normalized"))
PER_QUERY = {"x": 1, "residual": 1, "output": 1}
EMPTY = empty(arguments, "batch", "queries", "channels")
NUMBERS = {"eps": 0.25}
TINY = dict(batch=2, queries=5, channels=7, zeros=1)
DETECTOR = dict(batch=1, channels=256)
OF_WORKERS = dict(queries=200)
MANY = dict(batch=131_200, queries=64, channels=256)
MANY_GIGABYTES = 30
FLOAT32_UNDER_AUTOCAST = True
FLOP_OF_AN_ELEMENT = ("x", 8, 13)
BAD_INPUTS = bad_inputs(
    "add_layer_norm",
    arguments,
    *no_numbers("eps"),
    ("NaN", "eps", constant(float("nan")), ValueError, r"eps: expected a number >= 0, got nan"),
    ("no tensor", "residual", constant(None), TypeError, r"residual: expected a tensor, got NoneType"),
    ("no dimensions", "x", lambda x: x[0, 0, 0], ValueError, r"x: expected shape \[..., C\], got \[\]"),
    ("other N", "residual", without_last(1), ValueError, r"residual: expected shape \[2, 9, 24\] like x, got \[2, 8"),
    ("other C", "weight", without_last(0), ValueError, r"weight: expected shape \[C=24\], got \[23\]"),
    ("other C", "bias", without_last(0), ValueError, r"bias: expected shape \[C=24\], got \[23\]"),
    ("integers", "x", to(torch.int32), TypeError, r"x: expected dtype .*, got torch.int32"),
    ("shorter", "weight", to(torch.bfloat16), TypeError, r"weight: expected dtype torch.float32, got torch.bfloat16"),
    ("negative", "eps", constant(-1e-5), ValueError, r"eps: expected a number >= 0, got -1e-05"),
    ("unknown", "keep", constant("input"), ValueError, r"keep: expected one of output, normalized, got 'input'"),
    (
        "elsewhere",
        "bias",
        lambda b: b.detach().to("meta"),
        ValueError,
        r"bias: expected on cpu like x, got one on meta",
    ),
)
