"""Whatever a call holds, it is right or refused: seeded, time-boxed draws of sizes, strides, dtypes, masks and garbage.

`tests/sanitize.py` runs them with instrumented kernels; each op and test has FUZZ_SECONDS, and one round at least.
"""

import os
import time
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import route_kernels as rk
from route_kernels import native
from route_kernels.backends import OPS
from route_kernels.precision import FLOATING
from route_kernels.testing import check_accuracy, map_tensors, outcome, sample_arguments

pytestmark = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
REFUSED = (TypeError, ValueError)
INTEGERS = [-(2**63), -(2**31), -7, -1, 0, 1, 3, 2**31 - 1, 2**31, 2**62]
NUMBERS = [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e-300, 1e300, 3, None, True, "1"]
ROUND = settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
each_op = pytest.mark.parametrize("op", OPS)


def fuzzed(test, seconds=SECONDS):
    """Run `test(data)` on rounds of draws, each round with a seed of its own, until the time is over."""
    end = time.monotonic() + seconds
    for number in count():
        if number and time.monotonic() > end:
            return
        seed(number)(ROUND(given(st.data())(test)))()


def drawn_call(data, op):
    """A right call: a sample of any number of queries, in any dtype."""
    queries, dtype = data.draw(st.integers(1, 70)), data.draw(st.sampled_from(FLOATING))
    samples = sample_arguments(op, dtype, queries=queries)
    return samples[data.draw(st.sampled_from(sorted(samples)))]


def with_other_strides(data, tensor):
    """A view of a larger tensor full of NaN, or of another order, with the same values."""
    kind = data.draw(st.sampled_from(["as it is", "last but not first", "sliced", "every second"]))
    plain = tensor.detach()
    if kind == "last but not first" and tensor.dim() > 1:
        plain = plain.transpose(0, -1).contiguous().transpose(0, -1)
    elif kind in ("sliced", "every second") and tensor.dim():
        step = 1 if kind == "sliced" else 2
        fill = float("nan") if tensor.is_floating_point() else False if tensor.dtype == torch.bool else -(2**31)
        wider = torch.full((*tensor.shape[:-1], step * tensor.shape[-1] + 3), fill, dtype=tensor.dtype)
        view = wider[..., 2 : 2 + step * tensor.shape[-1] : step]
        view.copy_(plain)
        plain = view
    return plain.requires_grad_(tensor.requires_grad)


@each_op
def test_any_right_call_is_right(op):
    def check(data):
        torch.set_num_threads(data.draw(st.integers(1, 4)))
        call = map_tensors(drawn_call(data, op), lambda tensor: with_other_strides(data, tensor))
        with rk.backend("cpu"):
            check_accuracy(op, call)

    fuzzed(check)


def spoilt(data, value):
    """Garbage in the place of an argument."""
    if isinstance(value, torch.Tensor):
        kind = data.draw(st.sampled_from(["values", "one value", "shorter", "turned", "dtype", "expanded"]))
        if "value" in kind and value.dtype != torch.bool:
            choices = NUMBERS[:3] if value.is_floating_point() else INTEGERS
            limits = None if value.is_floating_point() else torch.iinfo(value.dtype)
            garbage = data.draw(st.sampled_from(choices))
            garbage = garbage if limits is None else min(max(garbage, limits.min), limits.max)
            at = slice(None) if kind == "values" else slice(data.draw(st.integers(0, 40)), None, 97)
            changed = value.detach().clone(memory_format=torch.contiguous_format)
            changed.view(-1)[at] = garbage
            return changed.requires_grad_(value.requires_grad)
        if kind == "shorter" and value.dim():
            dim = data.draw(st.integers(0, value.dim() - 1))
            return value.detach().narrow(dim, 0, max(value.shape[dim] - 1, 0))
        if kind == "turned" and value.dim() > 1:
            return value.detach().transpose(0, 1)
        if kind == "expanded":
            return value.detach().flatten()[:1].expand(value.shape)
        return value.detach().to(data.draw(st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float64])))
    if isinstance(value, tuple) and value and not isinstance(value[0], torch.Tensor):
        at = data.draw(st.integers(0, len(value) - 1))
        return (*value[:at], spoilt(data, value[at]), *value[at + 1 :])
    return data.draw(st.sampled_from(INTEGERS if isinstance(value, int) else NUMBERS))


@each_op
def test_any_other_call_is_refused_or_gives_its_shape(op):
    def check(data):
        torch.set_num_threads(data.draw(st.integers(1, 4)))
        call = drawn_call(data, op)
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(st.sampled_from(sorted(call)))
            if isinstance(call[name], rk.RoutingFactors):
                field = data.draw(st.sampled_from(call[name]._fields))
                call[name] = call[name]._replace(**{field: spoilt(data, getattr(call[name], field))})
            else:
                call[name] = spoilt(data, call[name])
        try:
            with rk.backend("reference"):
                expected = getattr(rk, op)(**call)
        except REFUSED as error:
            with rk.backend("cpu"), pytest.raises(type(error)):
                getattr(rk, op)(**call)
        else:
            with rk.backend("cpu"):
                found = outcome(getattr(rk, op), call, torch.ones_like(expected) if expected.requires_grad else None)
            assert found["output"].shape == expected.shape and found["output"].dtype == expected.dtype

    fuzzed(check)
