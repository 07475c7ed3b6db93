"""Inputs of `ms_deform_attn_fused` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import LEVELS, Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, no_integers, to, without_last


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


EMPTY = empty(arguments, "batch", "queries", "heads", "channels", "points")
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
