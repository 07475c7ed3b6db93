"""Cases to measure, with their arguments, contenders and targets. Each op's are in its file in `ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import route_kernels as rk
from route_kernels.testing import EAGER, Arguments, map_tensors

OURS = "route-kernels"
MIB = 2**20
DEVICE = torch.device("cuda", 0)


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """`call(**arguments)` gives the output; `formula` is what it should compute, in PyTorch's own operators.

    `takes` names the arguments that both are given; None is all.
    """

    name: str
    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    takes: tuple[str, ...] | None = None

    def taken(self, arguments: Arguments) -> Arguments:
        return arguments if self.takes is None else {name: arguments[name] for name in self.takes}


@dataclass(frozen=True)
class Target:
    """Our time is at most `at_most` times that of the contender `against`."""

    against: str
    at_most: float


@dataclass(frozen=True)
class Case:
    """A row: `contenders[0]` is ours; what `make_arguments` marks as requiring a gradient is differentiated."""

    op: str
    name: str
    backward: bool
    make_arguments: Callable[[], Arguments]
    contenders: Sequence[Contender]
    targets: Sequence[Target] = ()
    quick: bool = False


@dataclass(frozen=True)
class GpuCase(Case):
    """A row; `part` is the process it is measured in, `peak_at_most` a target for our bytes beside the inputs."""

    part: str = ""
    peak_at_most: int | None = None

    def arguments_on(self, device: torch.device) -> Arguments:
        moved = map_tensors(self.make_arguments(), lambda x: x.detach().to(device).requires_grad_(x.requires_grad))
        return moved


def eager(op: str, name: str) -> Contender:
    """The op as PyTorch users write it."""
    return Contender(name, EAGER[op], EAGER[op])


def ours(op: str) -> Contender:
    """The public op."""
    return Contender(OURS, getattr(rk, op), EAGER[op])


def without_gradients(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    return lambda: map_tensors(make(), torch.Tensor.detach)


def cases() -> list[Case]:
    """Every row of speed, an op at a time."""
    return [case for op in _declared() for case in op.cases()]


def gpu_cases() -> list[GpuCase]:
    """Every row of speed on a GPU, the most important first."""
    return [case for op in by_value() for case in op.gpu_cases()]


def parts() -> list[str]:
    """Parts of the measurements on a GPU, each for a process of its own, by value."""
    return list(dict.fromkeys(case.part for case in gpu_cases()))


def by_value() -> list[ModuleType]:
    """The declarations of the ops, the headline first: a report on a GPU may end early."""
    return sorted(_declared(), key=lambda op: -op.GPU_SECONDS)


def _declared() -> list[ModuleType]:
    from . import ops  # whose files need the classes above

    return [ops.declaration(op) for op in ops.NAMES]
