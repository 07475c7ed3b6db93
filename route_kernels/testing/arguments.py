"""The arguments of an op as one thing: a dict by name, tensors and `RoutingFactors` among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import route_kernels as rk

from ..ops.routed_attention import RoutingFactors

Arguments = dict[str, Any]
LEVELS = ((5, 7), (3, 4), (1, 1))  # odd sizes and a level of one pixel


def normals(seed: int, device: str) -> Callable[..., torch.Tensor]:
    """normal(*shape, dtype=..., scale=1.0): one draw after the other, leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        drawn = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    return normal


def random_boxes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes (cx, cy, w, h) within the image: [*shape, 4] float64."""
    sides = 0.05 + 0.4 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    centres = sides / 2 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * (1 - sides)
    return torch.cat([centres, sides], -1)


def empty(arguments: Callable[..., Arguments], *dimensions: str) -> dict[str, Callable[[], Arguments]]:
    """By dimension, a call in which it has size 0."""
    return {dimension: partial(arguments, **{dimension: 0}) for dimension in dimensions}


def call(op: str, arguments: Arguments) -> torch.Tensor:
    """The public op of that name."""
    return getattr(rk, op)(**arguments)


def named_tensors(arguments: Arguments) -> Iterator[tuple[str, torch.Tensor]]:
    """("query", ...), ("routing.sup_q", ...), ...: every tensor among the arguments."""
    for name, argument in arguments.items():
        if isinstance(argument, torch.Tensor):
            yield name, argument
        elif isinstance(argument, RoutingFactors):
            yield from named_tensors({f"{name}.{field}": item for field, item in argument._asdict().items()})


def map_tensors(arguments: Arguments, function: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
    """The arguments with `function` applied to every tensor."""
    mapped = {}
    for name, argument in arguments.items():
        if isinstance(argument, torch.Tensor):
            argument = function(argument)
        elif isinstance(argument, RoutingFactors):
            argument = RoutingFactors(**map_tensors(argument._asdict(), function))
        mapped[name] = argument
    return mapped


def converted(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """New leaves with floating tensors in `dtype`; what requires a gradient still does."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        new = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)
        return new.requires_grad_(tensor.requires_grad)

    return map_tensors(arguments, convert)
