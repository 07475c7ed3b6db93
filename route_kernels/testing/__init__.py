"""Sample inputs, bad inputs, the tolerance policy and training steps: what tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..doctor.training_step import counted_calls, perturb_sampling, relative_errors, tensors_in, training_step
from .accuracy import assert_as_accurate, check_accuracy, errors, outcome, root_mean_square, yardstick
from .arguments import Arguments, call, converted, map_tensors, named_tensors
from .bad_inputs import BadInput
from .eager import EAGER, grid_sampled, under_eager
from .ops import NAMES, declaration

__all__ = [
    "BAD_INPUTS",
    "EAGER",
    "Arguments",
    "BadInput",
    "assert_as_accurate",
    "call",
    "check_accuracy",
    "converted",
    "counted_calls",
    "declaration",
    "errors",
    "grid_sampled",
    "map_tensors",
    "named_tensors",
    "outcome",
    "perturb_sampling",
    "relative_errors",
    "root_mean_square",
    "sample_arguments",
    "tensors_in",
    "training_step",
    "under_eager",
    "yardstick",
]

BAD_INPUTS: tuple[BadInput, ...] = sum((declaration(op).BAD_INPUTS for op in NAMES), ())


def sample_arguments(op: str, dtype: torch.dtype = torch.float32, **sizes: object) -> dict[str, Arguments]:
    """By label, calls of a public op that together reach every argument; `sizes` go to the op's `arguments`."""
    return declaration(op).samples(dtype, **sizes)


def __getattr__(name: str) -> Callable[..., Arguments]:
    """`add_linear_arguments`: the function `arguments` of `ops/add_linear.py`, and so for every op."""
    op = name.removesuffix("_arguments")
    if op == name or op not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return declaration(op).arguments
