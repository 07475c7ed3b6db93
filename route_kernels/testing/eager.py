"""The public ops on the `eager` backend: how accurate, and how fast, PyTorch's own operators are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

import route_kernels as rk

from .. import backends


def under_eager(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function`, called inside `with route_kernels.backend("eager"):`."""

    @wraps(function)
    def run(*args, **kwargs):
        with backends.backend("eager"):
            return function(*args, **kwargs)

    return run


EAGER = {op: under_eager(getattr(rk, op)) for op in (*backends.OPS, *backends.PRODUCTS)}
