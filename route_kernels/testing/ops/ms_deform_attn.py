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


SHAPES = {  # channels around vectors of 2 to 16 lanes, points around blocks of 16, queries around batches of 8
    "one of each": dict(levels=((1, 1),), batch=1, heads=1, channels=1, queries=1, points=1),
    "3 channels": dict(channels=3, queries=8, points=1),
    "8 channels": dict(channels=8, queries=17, heads=3),
    "16 channels": dict(channels=16, queries=7, points=4),
    "17 channels": dict(channels=17, queries=5, points=3, batch=1),
    "32 channels, few queries": dict(levels=((20, 21),), channels=32, queries=3, points=4),
    "32 channels, many queries": dict(levels=((6, 5), (3, 3)), channels=32, queries=40, points=8),
    "64 channels": dict(channels=64, queries=9, points=5, heads=1),
    "100 channels": dict(channels=100, queries=10, points=6, batch=1),
    "16 levels": dict(levels=((2, 3), (4, 1)) * 8, channels=4, points=1),
    "20 points": dict(levels=((3, 5),), channels=5, points=20),
    "33 points": dict(levels=((3, 5), (1, 7), (9, 1)), channels=2, points=11),
    "rows and columns": dict(levels=((1, 9), (9, 1), (1, 1)), channels=6),
    "few points of uneven levels": dict(counts=(4, 1, 1), queries=20),
    "many points of uneven levels": dict(counts=(17, 1, 15), queries=20),
}
SMALL_SHAPES = {  # channels of no power of two, more queries than a block, levels of one pixel, row and column
    "one of each": dict(levels=((1, 1),), batch=1, heads=1, channels=1, queries=1, points=1),
    "3 channels": dict(levels=((5, 7), (3, 4)), channels=3, queries=8, points=1),
    "several blocks": dict(levels=((6, 5),), channels=16, queries=37, points=2, heads=1),
    "24 channels": dict(levels=((4, 3), (2, 2)), channels=24, queries=11, points=2, batch=1),
    "rows and columns": dict(levels=((1, 9), (9, 1), (1, 1)), channels=8, batch=1, points=3),
    "8 levels": dict(levels=((2, 3), (4, 1)) * 4, channels=4, points=1, batch=1),
}
GRADCHECK = (
    dict(queries=3, channels=3, points=2, batch=1),
    dict(queries=3, channels=3, counts=(2, 0, 1), batch=1, seed=1),
)
PER_QUERY = {"sampling_locations": 1, "attention_weights": 1, "output": 1}
SUMMED_BY_ATOMICS = ("grad value",)
MIXED = tuple(
    dict(dtype=dtype, point_dtype=point_dtype)
    for dtype, point_dtype in (
        (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16), (torch.float16, torch.bfloat16), (torch.float64, torch.float32),
        (torch.float64, torch.float16),
    )
)  # fmt: skip
EMPTY = empty(arguments, "batch", "queries", "heads", "channels", "points")
EMPTY["levels"] = lambda: arguments(levels=())
EMPTY["pixels of every level"] = lambda: arguments(levels=((0, 0), (3, 0), (0, 2)))
EMPTY["pixels of a level"] = lambda: arguments(levels=((4, 3), (0, 5), (2, 2), (3, 0)))
EMPTY["points of a level"] = lambda: arguments(counts=(1, 0, 5))
EMPTY["points of two levels"] = lambda: arguments(counts=(0, 6, 0))
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
