"""Launches that cost the host little: `kernel[grid](*tensors, *floats)`, with a grid that is made once for a shape.

For each launch Triton finds out how the arguments specialize a kernel: that they are 1, or multiples of 16. On the host
it takes 20 us for 50 of them. Here a `Grid` keeps what was found, for tensors of the same alignments, and `kept` keeps
the grids of tensors of the same shapes, strides and dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from .availability import interpreted

MOST_PLANS = 4096
Plan = TypeVar("Plan")

_plans: dict[tuple[Any, ...], Any] = {}


class Grid:
    """The programs of a launch, and what they are given beside tensors and floats: integers and constants.

    A kernel's parameters come in this order: tensors (or None), floats, integers, constants.
    """

    def __init__(self, programs: tuple[int, ...], *integers: int | tuple[int, ...], **constants: Any) -> None:
        self.programs, self.integers, self.constants = programs, integers, constants
        self.runners: dict[tuple[Any, ...], tuple[Callable, tuple[Any, ...]]] = {}  # by device and alignments


class Kernel:
    """A `triton.jit` function that is launched by `kernel[grid](*tensors, *floats)`, with a `Grid`."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return functools.partial(run, self.function, grid)


def run(function: Any, grid: Grid, *arguments: torch.Tensor | float | None) -> None:
    """Launches on the device of the first tensor and its current stream; a grid with a 0 in it nothing."""
    if 0 in grid.programs:
        return
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(function, grid, device.index, arguments)
    else:
        _run(function, grid, device.index, arguments)


def _run(function: Any, grid: Grid, device: int | None, arguments: tuple[Any, ...]) -> None:
    every = (*arguments, *grid.integers)
    if not _finds_again():
        function.run(*every, grid=grid.programs, warmup=False, **grid.constants)
        return
    seen = (device, *[x.data_ptr() % 16 if isinstance(x, torch.Tensor) else type(x) for x in arguments])
    found = grid.runners.get(seen)
    if found is not None:
        launch, constants = found
        launch(*every, *constants)
        return
    compiled = function.run(*every, grid=grid.programs, warmup=False, **grid.constants)
    if compiled is not None:  # else a hook of Triton's took the launch
        names = [parameter.name for parameter in function.params[len(every) :]]
        grid.runners[seen] = compiled[(*grid.programs, 1, 1)], tuple(grid.constants[name] for name in names)


def kept(make: Callable[..., Plan], tensors: Sequence[torch.Tensor | None], *others: Any) -> Plan:
    """`make(tensors, *others)`: what an op launches, made once for tensors of these shapes, strides and dtypes.

    others: all else that it depends on, hashable. The plan must not hold on to the tensors.
    """
    known = [None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    seen = (make, tensors[0].device, others, *known)
    plan = _plans.get(seen)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[seen] = make(tensors, *others)
    return plan


@functools.cache
def _finds_again() -> bool:
    """NVIDIA only: on AMD GPUs a tensor's size specializes a kernel, too."""
    return not interpreted() and torch.version.hip is None


def input_precision() -> str:
    """The precision of `tl.dot` on float32 tiles: "tf32" only where PyTorch's own products may use it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def contiguous_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor; `x.new_empty(x.shape)` takes twice as long on the host."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`; `triton.cdiv` takes ten times as long on the host."""
    return -(-size // block)


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()


def padded(width: int) -> int:
    """The power of two, from 16, that `tl.dot` takes for `width` channels."""
    return max(power_of_two(width), 16)
