"""FLOPs of the matrix products inside our ops, for `FlopCounterMode(custom_mapping=PRODUCTS)` of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch

from route_kernels.ops import add_linear, feed_forward  # noqa: F401  (they define the operators)

Shape = tuple[int, ...]


def _feed_forward(x: Shape, w1: Shape, b1: Shape | None, w2: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w1) + math.prod(w2))


def _feed_forward_backward(grad: Shape, x: Shape, w1: Shape, b1: Shape | None, w2: Shape, *_: Any, **__: Any) -> int:
    """The hidden layer again, then a gradient each of what the two products multiply."""
    return 2 * math.prod(x[:-1]) * (3 * math.prod(w1) + 2 * math.prod(w2))


def _add_linear(x: Shape, position: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _add_linear_backward(grad: Shape, x: Shape, position: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(x[:-1]) * math.prod(weight)


_ops = torch.ops.route_kernels
PRODUCTS = {
    _ops.feed_forward: _feed_forward,
    _ops.feed_forward_backward: _feed_forward_backward,
    _ops.add_linear: _add_linear,
    _ops.add_linear_backward: _add_linear_backward,
}
