"""The public ops on the `eager` backend: how accurate, and how fast, PyTorch's own operators are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

import route_kernels as rk

from .. import backends, eager
from ..ops.levels import flat_integers, level_pairs, level_starts


def under_eager(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function`, called inside `with route_kernels.backend("eager"):`."""

    @wraps(function)
    def run(*args, **kwargs):
        with backends.backend("eager"):
            return function(*args, **kwargs)

    return run


def grid_sampled(value, spatial_shapes, level_start_index, locations, weights) -> torch.Tensor:
    """Deformable attention as foreign code has it without a kernel, which calls no op of ours: [B, N, H * D]."""
    sizes = flat_integers("grid_sampled", "spatial_shapes", spatial_shapes)
    starts = level_starts(sizes, flat_integers("grid_sampled", "level_start_index", level_start_index))
    return eager.ms_deform_attn(value, level_pairs(sizes), starts, locations, weights)


EAGER = {op: under_eager(getattr(rk, op)) for op in (*backends.OPS, *backends.PRODUCTS)}
