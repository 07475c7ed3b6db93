"""Cases to measure, with their arguments, contenders and targets. Each op's are in its file in `ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import route_kernels as rk
from route_kernels.testing import EAGER, Arguments, map_tensors

OURS = "route-kernels"
MIB = 2**20


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


def everything(arguments: Arguments) -> Arguments:
    """Arguments that most contenders take."""
    return arguments


@dataclass(frozen=True)
class Contender:
    """`call(**taken(arguments))` gives the output; `formula` is what it should compute, in PyTorch's own operators.

    Output and gradients are computed within `around()`.
    """

    name: str
    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    taken: Callable[[Arguments], Arguments] = everything
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Target:
    """Our time is at most `at_most` times that of the contender `against`."""

    against: str
    at_most: float


@dataclass(frozen=True, eq=False)
class Case:
    """A row: `contenders[0]` is ours; what `make_arguments` marks as requiring a gradient is differentiated.

    Attributes:
        part: of a report on a GPU, the process that it is measured in.
        peak_at_most, microseconds_at_most: targets of ours alone: bytes beside the inputs, time.
    """

    op: str
    name: str
    backward: bool
    make_arguments: Callable[[], Arguments]
    contenders: Sequence[Contender]
    targets: Sequence[Target] = ()
    quick: bool = False
    part: str = ""
    peak_at_most: int | None = None
    microseconds_at_most: float | None = None

    @property
    def passes(self) -> str:
        return "forward + backward" if self.backward else "forward"

    def arguments_on(self, device: torch.device) -> Arguments:
        return map_tensors(self.make_arguments(), lambda x: x.detach().to(device).requires_grad_(x.requires_grad))


def eager(op: str, name: str) -> Contender:
    """The op as PyTorch users write it."""
    return Contender(name, EAGER[op], EAGER[op])


def ours(op: str) -> Contender:
    """The public op."""
    return Contender(OURS, getattr(rk, op), EAGER[op])


def without_gradients(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    return lambda: map_tensors(make(), torch.Tensor.detach)


def cases(device: str) -> list[Case]:
    """Every row of speed on a device of type "cpu" or "cuda", the ops by value: a report may end early."""
    return [case for op in by_value() for case in op.cases(device)]


def parts() -> list[str]:
    """Names of processes that measure on a GPU, by value."""
    return list(dict.fromkeys(case.part for case in cases("cuda")))


def by_value() -> list[ModuleType]:
    """The declarations of the ops, the headline first."""
    from . import ops  # whose files need the classes above

    return sorted(map(ops.declaration, ops.NAMES), key=lambda op: -op.GPU_SECONDS)
