"""Whether a contender computes what it is timed for, by the tolerance policy of `route_kernels.testing`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from route_kernels.testing import Arguments, converted, errors, outcome

Results = dict[str, Tensor]


def yardstick(
    formula: Callable[..., Tensor], arguments: Arguments, grad_output: Tensor | None
) -> tuple[Results, Results]:
    """Output and gradients of the formula in plain PyTorch: in the dtype of the arguments, and in float64."""
    exact = outcome(formula, converted(arguments, torch.float64), grad_output)
    return outcome(formula, arguments, grad_output), exact


def complaint(found: Results, rounded: Results, exact: Results) -> str | None:
    """What is wrong with the results of a contender, or None."""
    if found.keys() != exact.keys():
        return f"gives {', '.join(found)} instead of {', '.join(exact)}"
    for name, expected in exact.items():
        if found[name].shape != expected.shape:
            return f"{name}: shape {list(found[name].shape)} instead of {list(expected.shape)}"
    for name, (error, allowed) in errors(found, rounded, exact).items():
        if not error <= allowed:
            return f"{name}: RMS error {error:.2e}, allowed {allowed:.2e}"
    return None
