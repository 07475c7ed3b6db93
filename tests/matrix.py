"""Parts of the matrix of tests: every op, every way to run it, every call that its declaration names.

A way is a backend; "in order" asks for sums in a fixed order where an op adds with atomics (PyTorch's deterministic
mode). "emulated" is the CUDA library on the CPU, its launches over the checked threads of `simt/`.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

import route_kernels as rk
from route_kernels import backends, cuda, native
from route_kernels.backends import OPS, PRODUCTS
from route_kernels.testing import (
    Arguments,
    call,
    check_accuracy,
    declaration,
    named_tensors,
    outcome,
    sample_arguments,
)

PUBLIC = (*OPS, *PRODUCTS)
WAYS = ("cpu", "triton", "triton in order", "emulated", "emulated in order")
INTERPRETED = WAYS[1:]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def declared(op: str, name: str, default: object = ()) -> object:
    return getattr(declaration(op), name, default)


@functools.cache
def runs(op: str, way: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `way` runs the op here, in this dtype, and is not the same as another."""
    backend, _, in_order = way.partition(" ")
    if in_order and not declared(op, "SUMMED_BY_ATOMICS"):
        return False
    if op in PRODUCTS:
        return backend in ("cpu", "reference")
    if backend == "emulated":
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        return op in cuda.OPS and native.load_error is None and compiler is not None
    return rk.can_run(op, backend, torch.empty(0, dtype=dtype))[0]


def ways_of(op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    return [way for way in WAYS if runs(op, way, dtype)]


@contextmanager
def running(way: str) -> Iterator[None]:
    """Inside, the public ops go that way, and so do their gradients."""
    backend, _, in_order = way.partition(" ")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(bool(in_order) or deterministic)  # and what is empty is filled with NaN
    try:
        if backend == "emulated":
            from cuda_emulation import host_library

            ops = host_library()
            with mock.patch.object(backends, "kernel", lambda op, direction, _: getattr(ops, f"{op}_{direction}")):
                yield
        else:
            with rk.backend(backend):
                yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


def results(
    op: str, arguments: Arguments, way: str, grad_output: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """{"output": ..., "grad NAME": ...} of the public op; the incoming gradient is normal unless it is given."""
    with running(way):
        if grad_output is None:
            with torch.no_grad():
                output = call(op, arguments)
            generator = torch.Generator().manual_seed(1)
            grad_output = torch.randn(output.shape, generator=generator).to(output.dtype)
        return outcome(lambda **given: call(op, given), arguments, grad_output)


def check(op: str, arguments: Arguments, way: str) -> None:
    """Output and every gradient are as accurate as PyTorch's own operators."""
    with running(way):
        check_accuracy(op, arguments)


def assert_same(found, expected, loosely=(), tolerance: float = 1e-5) -> None:
    """Bitwise; what is named in `loosely` to `tolerance` of the largest entry."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if name in loosely:
            atol = tolerance * max(1.0, tensor.abs().max().item()) if tensor.numel() else 0.0
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=atol, msg=name)
        else:
            assert torch.equal(found[name], tensor), name


def sizes_of_samples(way: str) -> dict[str, int]:
    """Interpreters are slow: more than one tile, and no more."""
    return {"cpu": {}, "reference": {}, "triton": {"batch": 1, "queries": 19}}.get(
        way.partition(" ")[0], {"batch": 1, "queries": 5}
    )


def shapes_of(op: str, way: str) -> dict[str, dict]:
    return declared(op, "SMALL_SHAPES" if way in INTERPRETED else "SHAPES", {})


def arguments_of(op: str, label: str, way: str, dtype: torch.dtype = torch.float32) -> Arguments:
    """A call by the label of a sample or of a shape."""
    shapes = shapes_of(op, way)
    if label in shapes:
        return declaration(op).arguments(dtype=dtype, **shapes[label])
    return sample_arguments(op, dtype, **sizes_of_samples(way))[label]


def samples(ways: tuple[str, ...] = WAYS, ops: tuple[str, ...] = PUBLIC) -> list[tuple[str, str, str]]:
    """(op, label, way) for every sample and every way that runs it."""
    return [(op, label, way) for op in ops for label in sample_arguments(op) for way in ways if runs(op, way)]


def each_sample(*ways: str, ops: tuple[str, ...] = PUBLIC):
    return pytest.mark.parametrize("op, label, way", samples(ways or WAYS, ops))


def each_way(*ops: str, ways: tuple[str, ...] = WAYS, dtype: torch.dtype = torch.float32):
    """The parameters of a test of these ops, one or more."""
    if len(ops) == 1:
        return pytest.mark.parametrize("way", [way for way in ways if runs(ops[0], way, dtype)])
    return pytest.mark.parametrize("op, way", [(op, way) for op in ops for way in ways if runs(op, way, dtype)])


def tensor_named(arguments: Arguments, name: str) -> torch.Tensor | None:
    return dict(named_tensors(arguments)).get(name)
