"""The L feature levels that deformable attention samples: sizes and starts within the S flattened positions.

Inside the torch ops they are flat lists of ints: (h_1, w_1, ..., h_L, w_L) and (start_1, ..., start_L).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

LONGEST_SIDE = 2**24
"""Pixels up to which float32 coordinates can tell one from the next."""

SpatialShapes = torch.Tensor | Sequence[tuple[int, int]]
LevelStarts = torch.Tensor | Sequence[int] | None
PointCounts = torch.Tensor | Sequence[int] | None


def flat_spatial_shapes(op: str, spatial_shapes: SpatialShapes) -> list[int]:
    """[L, 2] integers or a sequence of (h, w) pairs -> [h_1, w_1, ..., h_L, w_L]. A tensor is read, so it must be real.

    Raises:
        TypeError, ValueError: not integers, not pairs.
    """
    if isinstance(spatial_shapes, torch.Tensor):
        if spatial_shapes.dtype not in _INTEGERS:
            raise TypeError(f"{op}: spatial_shapes: expected integers, got dtype {spatial_shapes.dtype}")
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"{op}: spatial_shapes: expected shape [L, 2], got {list(spatial_shapes.shape)}")
        return spatial_shapes.flatten().tolist()
    if not isinstance(spatial_shapes, Sequence):
        raise TypeError(
            f"{op}: spatial_shapes: expected a tensor [L, 2] or a sequence of (h, w), "
            f"got {type(spatial_shapes).__name__}"
        )
    flat = []
    for pair in spatial_shapes:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{op}: spatial_shapes: expected (h, w) pairs, got {pair!r}")
        flat += [_integer(op, "spatial_shapes", size) for size in pair]
    return flat


def flat_integers(op: str, argument: str, numbers: torch.Tensor | Sequence[int] | None) -> list[int] | None:
    """[L] integers or a sequence of ints -> a list; None stays None. A tensor is read, so it must be real.

    Raises:
        TypeError, ValueError: not integers, not one-dimensional.
    """
    if numbers is None:
        return None
    if isinstance(numbers, torch.Tensor):
        if numbers.dtype not in _INTEGERS:
            raise TypeError(f"{op}: {argument}: expected integers, got dtype {numbers.dtype}")
        if numbers.dim() != 1:
            raise ValueError(f"{op}: {argument}: expected shape [L], got {list(numbers.shape)}")
        return numbers.tolist()
    if not isinstance(numbers, Sequence):
        raise TypeError(
            f"{op}: {argument}: expected a sequence of ints, a tensor [L] or None, got {type(numbers).__name__}"
        )
    return [_integer(op, argument, number) for number in numbers]


def flat_level_starts(op: str, level_start_index: LevelStarts) -> list[int] | None:
    """Where each level starts, as a list; None (one level after the other) stays None."""
    return flat_integers(op, "level_start_index", level_start_index)


def _integer(op: str, argument: str, number: object) -> int:
    if isinstance(number, int | torch.SymInt):
        return number
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{op}: {argument}: expected ints, got {number!r}") from None


def level_pairs(spatial_shapes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """[h_1, w_1, ..., h_L, w_L] -> ((h_1, w_1), ..., (h_L, w_L))."""
    return tuple(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


def level_starts(spatial_shapes: Sequence[int], level_start_index: Sequence[int] | None) -> tuple[int, ...]:
    """Where each level starts: as given, or one level after the other."""
    if level_start_index is not None:
        return tuple(level_start_index)
    starts, position = [], 0
    for height, width in level_pairs(spatial_shapes):
        starts.append(position)
        position = position + height * width
    return tuple(starts)


def check_points(op: str, points: Sequence[int], levels: int, total: int) -> None:
    """Raises ValueError unless `points` are counts >= 0, one a level, that sum to `total` = K."""
    if len(points) != levels:
        raise ValueError(f"{op}: points: expected L={levels} counts like spatial_shapes, got {list(points)}")
    if any(count < 0 for count in points) or sum(points) != total:
        raise ValueError(f"{op}: points: expected counts >= 0 that sum to K={total}, got {list(points)}")


def check_levels(
    op: str, spatial_shapes: Sequence[int], level_start_index: Sequence[int] | None, positions: int
) -> None:
    """Raises ValueError unless there is a level and each lies within the `positions` = S of value.

    Without starts the levels must fill value exactly; with starts they may lie anywhere in it, even overlap.
    """
    if len(spatial_shapes) == 0 or len(spatial_shapes) % 2 != 0:
        raise ValueError(
            f"{op}: spatial_shapes: expected at least one level, each as (h, w), got {list(spatial_shapes)}"
        )
    pairs = level_pairs(spatial_shapes)
    for height, width in pairs:
        if height < 0 or width < 0:
            raise ValueError(f"{op}: spatial_shapes: expected sizes >= 0, got {(height, width)}")
        if height > LONGEST_SIDE or width > LONGEST_SIDE:
            raise ValueError(f"{op}: spatial_shapes: expected sizes <= {LONGEST_SIDE}, got {(height, width)}")
    if level_start_index is None:
        total = sum(height * width for height, width in pairs)
        if total != positions:
            raise ValueError(
                f"{op}: value: expected S = {total} positions, the sum of h * w over spatial_shapes {list(pairs)}, "
                f"got {positions}"
            )
        return
    if len(level_start_index) != len(pairs):
        raise ValueError(
            f"{op}: level_start_index: expected L={len(pairs)} starts like spatial_shapes, got {len(level_start_index)}"
        )
    for (height, width), start in zip(pairs, level_start_index, strict=True):
        if start < 0 or start + height * width > positions:
            raise ValueError(
                f"{op}: level_start_index: expected a level of {height} x {width} to lie within the S={positions} "
                f"positions of value, got start {start}"
            )
