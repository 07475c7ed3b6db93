"""Checks of every integration: a float64 training step before and after an apply(), and with a wrong op."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch

import route_kernels as rk
from route_kernels.integrations.codebase import Report
from route_kernels.testing import counted_calls, perturb_sampling, relative_errors, training_step

TOLERANCE = 1e-8
"""The most that float64 results differ by where only the order of their sums does."""


def assert_agree(found, expected, tolerance=TOLERANCE):
    """Raises AssertionError that names the worst results; a missing gradient is one."""
    errors = {name: error for name, error in relative_errors(found, expected).items() if not error <= tolerance}
    worst = sorted(errors, key=errors.get, reverse=True)[:5]
    if worst:
        missing = [name for name in errors if expected.get(name) is not None and found.get(name) is None]
        raise AssertionError(
            f"{len(errors)} of {len(expected)} results differ by more than {tolerance:g}"
            + (f", {len(missing)} of them missing (like {missing[0]!r})" if missing else "")
            + ": "
            + ", ".join(f"{name} by {errors[name]:.2g}" for name in worst)
        )


@contextmanager
def align_corners_mistaken():
    """Every deformable attention inside samples at pixel x_loc (w - 1), as align_corners=True: the test of a test.

    The mistake sits in the reference backend, which is asked for; so both the plain and the fused op make it, however
    an integration calls them.
    """
    formulas = import_module("route_kernels.reference.ms_deform_attn")
    sample = formulas._bilinear

    def mistaken(level, height, width, locations):
        size = locations.new_tensor([width, height])
        return sample(level, height, width, (locations * (size - 1) + 0.5) / size)

    formulas._bilinear = mistaken
    try:
        with rk.backend("reference"):
            yield
    finally:
        formulas._bilinear = sample


def check_integration(
    function: Callable,
    inputs: Mapping | tuple,
    apply: Callable[[], Report],
    calls: Mapping[str, int],
    *,
    module: torch.nn.Module | None = None,
    tolerance: float = TOLERANCE,
):
    """The proof of an integration; returns the report of `apply`.

    The sampling layers are perturbed, then outputs and gradients are compared before and after `apply()`, our ops must
    have been called exactly as in `calls` ({"ms_deform_attn": 6}), a wrong op must be noticed, and after `revert()`
    everything must be bit for bit as before, without a call.

    Args:
        function: the model in float64, or a function around `module`.
        inputs: keyword (mapping) or positional (tuple) arguments; tensors that require a gradient are compared, too.
    """
    owner = function if module is None else module
    assert perturb_sampling(owner) > 0, "the model has no layer called sampling_offsets or attention_weights"
    original = training_step(function, inputs, module=module)
    with apply() as report:
        assert report.replaced, f"nothing was replaced: {report}"
        with counted_calls() as counts:
            replaced = training_step(function, inputs, module=module)
        with align_corners_mistaken():
            mistaken = training_step(function, inputs, module=module)
    assert dict(counts) == dict(calls), f"expected calls {dict(calls)}, got {dict(counts)}"
    assert_agree(replaced, original, tolerance)
    with pytest.raises(AssertionError, match="results differ"):
        assert_agree(mistaken, original, tolerance)
    with counted_calls() as counts:
        assert_agree(training_step(function, inputs, module=module), original, tolerance=0)
    assert not counts, f"after revert() our ops are still called: {counts}"
    return report
