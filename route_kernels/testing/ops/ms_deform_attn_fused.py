"""Inputs of `ms_deform_attn_fused` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import LEVELS, Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, no_integers, to, without_last
from . import ms_deform_attn as plain


def arguments(
    *, levels: tuple[tuple[int, int], ...] = LEVELS, batch: int = 2, heads: int = 2, channels: int = 8,
    queries: int = 9, points: int = 2, coordinates: int = 2, reference_levels: int = 1, masked: bool = False,
    dtype: torch.dtype = torch.float32, point_dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """References inside the image, offsets of a few pixels (coordinates 2) or half boxes (coordinates 4)."""
    normal = normals(seed, device)
    point_dtype = dtype if point_dtype is None else point_dtype
    positions, samples = sum(height * width for height, width in levels), len(levels) * points
    references = normal(batch, queries, reference_levels, coordinates, dtype=torch.float64).detach().sigmoid()
    offsets = 1.5 * normal(batch, queries, heads, samples, 2, dtype=torch.float64).detach()
    given: Arguments = {
        "value": normal(batch, positions, heads, channels, dtype=dtype),
        "spatial_shapes": levels,
        "reference_points": references.to(point_dtype).requires_grad_(),
        "sampling_offsets": offsets.to(point_dtype).requires_grad_(),
        "attention_logits": normal(batch, queries, heads, samples, dtype=point_dtype),
    }
    if masked:
        given["value_mask"] = normal(batch, positions, dtype=torch.float32) > 0.8
    return given


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "points": arguments(dtype=dtype, **sizes),
        "boxes, mask": arguments(dtype=dtype, coordinates=4, reference_levels=len(LEVELS), masked=True, **sizes),
        "counts of points": {**arguments(dtype=dtype, **sizes), "points": (3, 1, 2)},
    }


SHAPES = {  # channels around vectors of 2 to 16 lanes, points around blocks of 16, queries around batches of 8
    "one of each": dict(levels=((1, 1),), batch=1, heads=1, channels=1, queries=1, points=1, masked=True),
    "3 channels": dict(channels=3, queries=8, points=1, masked=True),
    "17 channels": dict(channels=17, queries=5, points=3, batch=1, masked=True),
    "32 channels, few queries": dict(levels=((20, 21),), channels=32, queries=3, points=4, masked=True),
    "32 channels, many queries": dict(levels=((6, 5), (3, 3)), channels=32, queries=40, points=8, masked=True),
    "64 channels": dict(channels=64, queries=9, points=5, heads=1, masked=True),
    # seed 0 has a float16 sample on a knot
    "100 channels": dict(channels=100, queries=10, points=6, batch=1, seed=1, masked=True),
    "16 levels": dict(levels=((2, 3), (4, 1)) * 8, channels=8, points=1, masked=True),
    "33 points": dict(levels=((3, 5), (1, 7), (9, 1)), channels=16, points=11, masked=True),
    "point a level": dict(reference_levels=3),
    "point a level, masked": dict(reference_levels=3, masked=True),
    "box": dict(coordinates=4),
    "box, masked": dict(coordinates=4, masked=True),
    "box a level": dict(coordinates=4, reference_levels=3),
}
SMALL_SHAPES = {
    label: sizes | dict(coordinates=4, masked=True)
    for label, sizes in {
        **plain.SMALL_SHAPES,
        "box a level": dict(levels=((3, 4), (1, 2)), batch=1, queries=5, reference_levels=2),
    }.items()
} | {
    "point": dict(levels=((3, 4), (1, 2)), batch=1, queries=5),
    "point a level": dict(levels=((3, 4), (1, 2)), batch=1, queries=5, reference_levels=2, masked=True),
}
GRADCHECK = tuple(
    dict(queries=3, channels=3, batch=1, masked=True, coordinates=coordinates, reference_levels=levels)
    for coordinates in (2, 4)
    for levels in (1, 3)
)
PER_QUERY = {"reference_points": 1, "sampling_offsets": 1, "attention_logits": 1, "output": 1}
SUMMED_BY_ATOMICS = ("grad value",)
MIXED = tuple(dtypes | dict(coordinates=4) for dtypes in plain.MIXED)
EMPTY = empty(arguments, "batch", "queries", "heads", "channels", "points")
EMPTY["queries of boxes"] = lambda: arguments(queries=0, coordinates=4, masked=True)
EMPTY["points of boxes"] = lambda: arguments(points=0, coordinates=4)
EMPTY["levels"] = lambda: arguments(levels=())
EMPTY["pixels of every level"] = lambda: arguments(levels=((0, 0), (3, 0), (0, 2)))
EMPTY["pixels of a level"] = lambda: arguments(levels=((4, 3), (0, 5), (2, 2)), coordinates=4)
EMPTY["points of a level"] = lambda: arguments(coordinates=4, reference_levels=3) | {"points": (1, 0, 5)}
EMPTY["points of two levels"] = lambda: arguments() | {"points": (0, 6, 0)}
TINY = dict(batch=2, heads=1, queries=3, channels=4, points=1, levels=((2, 3), (1, 1)))
DETECTOR = dict(batch=1, heads=8, channels=32, points=4)
OF_WORKERS = dict(queries=100)
MANY = dict(batch=131_200, queries=2, heads=8, channels=32, levels=((16, 4),))
MANY_GIGABYTES = 30
BAD_INPUTS = bad_inputs(
    "ms_deform_attn_fused",
    lambda: arguments(masked=True),
    *no_integers("spatial_shapes", lambda size: ((size, 7), (3, 4), (1, 1))),
    *no_integers("points", lambda count: (2, 2, count)),
    ("no tensor", "sampling_offsets", constant(2.0), TypeError, r"sampling_offsets: expected a tensor, got float"),
    ("other S", "value", without_last(1), ValueError, r"value: expected S = 48 positions, .* got 47"),
    (
        "3 coordinates",
        "reference_points",
        lambda r: r[..., [0, 1, 1]],
        ValueError,
        r"reference_points: expected .*2 or 4",
    ),
    ("other L", "reference_points", lambda r: r.expand(-1, -1, 2, -1), ValueError, r"reference_points: expected "),
    ("other N", "reference_points", without_last(1), ValueError, r"reference_points: expected shape \[B=2, N=9"),
    ("other H", "sampling_offsets", without_last(2), ValueError, r"sampling_offsets: expected shape \[B=2, N, H=2, K"),
    ("x alone", "sampling_offsets", without_last(4), ValueError, r"sampling_offsets: expected shape .*K, 2\], got"),
    ("other K", "attention_logits", without_last(3), ValueError, r"attention_logits: expected shape .*K=6\], got"),
    ("wider", "attention_logits", to(torch.float64), TypeError, r"attention_logits: expected dtype .*, got .*float64"),
    ("other L", "points", constant((3, 3)), ValueError, r"points: expected L=3 counts .*, got \[3, 3\]"),
    ("other K", "points", constant((2, 2, 3)), ValueError, r"points: expected counts >= 0 that sum to K=6, got"),
    ("negative", "points", constant((8, -1, -1)), ValueError, r"points: expected counts >= 0 that sum to K=6, got"),
    ("other S", "value_mask", without_last(1), ValueError, r"value_mask: expected shape \[B=2, S=48\], got \[2, 47\]"),
    ("bytes", "value_mask", to(torch.uint8), TypeError, r"value_mask: expected dtype torch.bool, got torch.uint8"),
)
