"""Inputs of `ms_deform_attn` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import LEVELS, Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, no_integers, to, without_last


def arguments(
    *, levels: tuple[tuple[int, int], ...] = LEVELS, batch: int = 2, heads: int = 2, channels: int = 8,
    queries: int = 9, points: int = 2, counts: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32,
    point_dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Locations over and around the levels, positive weights that sum to 1; with `counts` packed, level after level."""
    normal = normals(seed, device)
    point_dtype = dtype if point_dtype is None else point_dtype
    positions = sum(height * width for height, width in levels)
    shape = (batch, queries, heads, *((len(levels), points) if counts is None else (sum(counts),)))
    locations = 0.5 + 0.35 * normal(*shape, 2, dtype=torch.float64).detach()
    weights = normal(*shape, dtype=torch.float64).detach().flatten(3).softmax(-1).view(shape)
    given: Arguments = {
        "value": normal(batch, positions, heads, channels, dtype=dtype),
        "spatial_shapes": levels,
        "level_start_index": None,
        "sampling_locations": locations.to(point_dtype).requires_grad_(),
        "attention_weights": weights.to(point_dtype).requires_grad_(),
    }
    if counts is not None:
        given["points"] = counts
    return given


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "default starts": arguments(dtype=dtype, **sizes),
        "given starts": {**arguments(dtype=dtype, **sizes), "level_start_index": (1, 23, 0)},
        "counts of points": arguments(dtype=dtype, counts=(3, 1, 2), **sizes),
    }


EMPTY = empty(arguments, "batch", "queries", "heads", "channels", "points")
TINY = dict(batch=2, heads=1, queries=3, channels=4, points=1, levels=((2, 3), (1, 1)))
DETECTOR = dict(batch=1, heads=8, channels=32, points=4)
OF_WORKERS = dict(queries=100)
MANY = dict(batch=131_200, queries=2, heads=8, channels=32, levels=((16, 4),))
MANY_GIGABYTES = 30
BAD_INPUTS = bad_inputs(
    "ms_deform_attn",
    arguments,
    *no_integers("spatial_shapes", lambda size: ((5, 7), (3, size), (1, 1))),
    *no_integers("level_start_index", lambda start: (0, start, 47)),
    (
        "none",
        "spatial_shapes",
        constant(None),
        TypeError,
        r"spatial_shapes: expected a tensor \[L, 2\] or .* got NoneType",
    ),
    ("no tensor", "value", constant(None), TypeError, r"value: expected a tensor, got NoneType"),
    ("3 dimensions", "value", lambda v: v[0], ValueError, r"value: expected shape \[B, S, H, D\], got \[48, 2, 8\]"),
    ("too short", "value", without_last(1), ValueError, r"value: expected S = 48 positions, .* got 47"),
    ("integers", "value", to(torch.int64), TypeError, r"value: expected dtype .*, got torch.int64"),
    ("flat", "spatial_shapes", constant((5, 7)), ValueError, r"spatial_shapes: expected \(h, w\) pairs, got 5"),
    ("fractions", "spatial_shapes", constant(((4.5, 2),)), TypeError, r"spatial_shapes: expected ints, got 4.5"),
    ("negative", "spatial_shapes", constant(((-1, 2),)), ValueError, r"spatial_shapes: expected sizes >= 0, got \(-1"),
    ("other L", "level_start_index", constant((0, 1)), ValueError, r"level_start_index: expected L=3 starts .* got 2"),
    ("beyond value", "level_start_index", constant((0, 40, 0)), ValueError, r"level_start_index: .* S=48 .* start 40"),
    ("fractions", "level_start_index", constant((0.5, 1, 2)), TypeError, r"level_start_index: expected ints, got 0.5"),
    (
        "other H",
        "sampling_locations",
        without_last(2),
        ValueError,
        r"sampling_locations: expected shape \[B=2, N, H=2",
    ),
    ("other L", "sampling_locations", without_last(3), ValueError, r"sampling_locations: expected shape .*L=3, P, 2"),
    ("x alone", "sampling_locations", without_last(5), ValueError, r"sampling_locations: expected shape .*, 2\], got"),
    ("wider", "sampling_locations", to(torch.float64), TypeError, r"sampling_locations: expected dtype .*, got .*64"),
    ("other P", "attention_weights", without_last(4), ValueError, r"attention_weights: expected shape .*P=2\], got"),
    ("other N", "attention_weights", without_last(1), ValueError, r"attention_weights: expected shape \[B=2, N=9"),
    (
        "integers",
        "attention_weights",
        to(torch.int64),
        TypeError,
        r"attention_weights: expected dtype .*, got .*int64",
    ),
    (
        "not packed",
        "points",
        constant((2, 2, 2)),
        ValueError,
        r"sampling_locations: expected shape \[B=2, N, H=2, K, 2\], got \[2, 9, 2, 3, 2, 2\]",
    ),
    ("a number", "points", constant(2), TypeError, r"points: expected a sequence of ints, .* got int"),
    ("fractions", "points", constant((2.5, 2, 2)), TypeError, r"points: expected ints, got 2.5"),
) + bad_inputs(
    "ms_deform_attn",
    lambda: arguments(counts=(3, 1, 2)),
    *no_integers("points", lambda count: (3, count, 2)),
    ("other L", "points", constant((3, 3)), ValueError, r"points: expected L=3 counts .*, got \[3, 3\]"),
    ("other K", "points", constant((2, 2, 3)), ValueError, r"points: expected counts >= 0 that sum to K=6, got"),
    ("negative", "points", constant((8, -1, -1)), ValueError, r"points: expected counts >= 0 that sum to K=6, got"),
    (
        "none",
        "points",
        constant(None),
        ValueError,
        r"sampling_locations: expected shape .*L=3, P, 2\], got \[2, 9, 2, 6, 2\]",
    ),
    (
        "packed, x alone",
        "sampling_locations",
        without_last(4),
        ValueError,
        r"sampling_locations: expected shape .*K, 2\], got",
    ),
    ("other K", "attention_weights", without_last(3), ValueError, r"attention_weights: expected shape .*K=6\], got"),
)
