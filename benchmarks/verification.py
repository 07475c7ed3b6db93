"""Whether a contender computes what it is timed for, by the tolerance policy of `route_kernels.testing`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from route_kernels.testing import Arguments, converted, errors, outcome

from .registry import Case, Unavailable

Results = dict[str, Tensor]


def yardstick(
    formula: Callable[..., Tensor], arguments: Arguments, grad_output: Tensor | None
) -> tuple[Results, Results]:
    """Output and gradients of the formula in plain PyTorch: in the dtype of the arguments, and in float64."""
    exact = outcome(formula, converted(arguments, torch.float64), grad_output)
    return outcome(formula, arguments, grad_output), exact


def complaint(found: Results, rounded: Results, exact: Results) -> str | None:
    """The first fault in the results of a contender, or None."""
    if found.keys() != exact.keys():
        return f"gives {', '.join(found)} instead of {', '.join(exact)}"
    for name, expected in exact.items():
        if found[name].shape != expected.shape:
            return f"{name}: shape {list(found[name].shape)} instead of {list(expected.shape)}"
    for name, (error, allowed) in errors(found, rounded, exact).items():
        if not error <= allowed:
            return f"{name}: RMS error {error:.2e}, allowed {allowed:.2e}"
    return None


@dataclass
class Verified:
    """The contenders of a case: calls of those that are right, and why the others have none."""

    calls: dict[str, Callable[[], Results]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def verify(case: Case, arguments: Arguments, grad_output: Tensor | None) -> Verified:
    """Run every contender once, forward and, with `grad_output`, backward, against the float64 results."""
    verified = Verified()
    yardsticks: dict[object, tuple[Results, Results]] = {}
    for contender in case.contenders:
        taken, kind = contender.taken(arguments), (contender.formula, contender.takes)
        if kind not in yardsticks:
            yardsticks[kind] = yardstick(contender.formula, taken, grad_output)
        try:
            found = outcome(contender.call, taken, grad_output)
        except Unavailable as reason:
            verified.unavailable[contender.name] = str(reason)
            continue
        except Exception as error:  # whatever somebody's package raises is the reason that is reported
            verified.failures[contender.name] = f"raises {error}"
            continue
        wrong = complaint(found, *yardsticks[kind])
        if wrong is not None:
            verified.failures[contender.name] = wrong
            continue
        verified.calls[contender.name] = partial(outcome, contender.call, taken, grad_output)
    return verified
