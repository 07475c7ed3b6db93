"""Which backend runs an op, and why another cannot.

`reference` is plain PyTorch, differentiated by PyTorch. `eager` is the same ops as PyTorch users write them, the
baseline of every figure: it runs on request alone. `cpu` is the native C++ library. `triton` compiles its kernels
on the GPU that runs them. `cuda` is the library of kernels that nvcc compiled with the package. An explicit request
runs or raises: it never falls back.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from . import cuda, eager, native, reference
from .precision import FLOATING
from .triton import availability

BACKENDS = ("reference", "eager", "cpu", "triton", "cuda")
PLAIN = {"reference": reference, "eager": eager}
"""Backends that are functions of PyTorch operators, one of each op's name; PyTorch differentiates them."""
PRODUCTS = ("feed_forward", "add_linear")
"""Ops of PyTorch's own matrix products: they run on every device, whichever kernels are requested."""
OPS = tuple(op for op in reference.OPS if op not in PRODUCTS)
"""Ops with kernels."""

_FASTEST_FIRST = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_of_process: str | None = None


class _Block:
    """One `with backend(...)`, around which others may be open."""

    def __init__(self, requested: str | None, outer: _Block | None):
        self.requested, self.outer, self.is_open = requested, outer, True


class _Thread(threading.local):
    """The blocks that a thread is in. Not ContextVars: torch.compile cannot read, and so not guard, those."""

    block: _Block | None = None  # the innermost that is open
    inside = False  # whether there is one; torch.compile reads, and guards, what is plain
    requested: str | None = None  # by it
    assumed: str | None = None

    def enter(self, block: _Block | None) -> None:
        self.block, self.inside, self.requested = block, block is not None, block and block.requested


_thread = _Thread()


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run this call."""


def _validated(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


def set_backend(name: str | None) -> None:
    """Request `name` for the whole process, wherever no `backend` block says otherwise; None is the fastest that runs.

    Raises:
        ValueError: `name` is not one of `BACKENDS`.
    """
    global _of_process
    _of_process = _validated(name)


def requested_backend() -> str | None:
    """The backend asked for by this thread's innermost `backend` block, or else by `set_backend`, or None."""
    return _thread.requested if _thread.inside else _of_process


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Request `name` inside the `with` block, in this thread: `with backend("reference"): ...`.

    The backward of an op runs on the backend that ran its forward, in whichever thread. Tasks of asyncio and generators
    share their thread's innermost block, as with `torch.no_grad`; in whichever order blocks end, none outlives its end.

    Raises:
        ValueError: `name` is not one of `BACKENDS`.
    """
    block = _Block(_validated(name), _thread.block)
    _thread.enter(block)
    try:
        yield
    finally:
        block.is_open = False
        while _thread.block is not None and not _thread.block.is_open:
            _thread.enter(_thread.block.outer)


@contextmanager
def assumed(name: str | None) -> Iterator[None]:
    """Inside the `with` block every call of this thread counts as one that backend `name` runs, even if it cannot.

    For fake tensors, which run nothing: a plan for a GPU needs no GPU.

    Raises:
        ValueError: `name` is not one of `BACKENDS`.
    """
    previous, _thread.assumed = _thread.assumed, _validated(name)
    try:
        yield
    finally:
        _thread.assumed = previous


def can_run(op: str, name: str, *tensors: torch.Tensor) -> tuple[bool, str]:
    """Whether backend `name` can run `op` on these tensors, and the reason.

    Args:
        op: one of `OPS`.
        name: one of `BACKENDS`.
        tensors: inputs of the call; without any, only what is installed is judged.

    Raises:
        ValueError: `op` or `name` is unknown.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    _validated(name)
    if name in PLAIN:
        return True, "plain PyTorch" if name == "reference" else "PyTorch's own operators, as its users write the op"
    if name == "triton":
        return availability.can_run(op, *tensors)
    if name == "cuda":
        return cuda.can_run(op, *tensors)
    if native.load_error is not None:
        return False, native.load_error
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return False, f"the cpu kernel takes CPU tensors, got one on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in FLOATING:
            return False, f"the cpu kernel takes float16, bfloat16, float32 and float64, got {tensor.dtype}"
    return True, "native C++ kernel"


def available_backends(op: str, *inputs: object) -> dict[str, tuple[bool, str]]:
    """For each backend whether it can run `op` on `inputs`, and why (not).

    Args:
        op: one of `OPS`.
        inputs: the positional inputs of the call; what is no tensor (None, shapes) is ignored, and a
            `RoutingFactors` counts as its tensors.

    Returns:
        `{"reference": (True, "plain PyTorch"), "cpu": (False, "<reason>"), ...}`
    """
    tensors = _tensors_in(inputs)
    return {name: can_run(op, name, *tensors) for name in BACKENDS}


def choose(op: str, *tensors: torch.Tensor | None) -> str:
    """The backend of a public op's call: assumed, requested, plain PyTorch while a graph is exported, or the fastest.

    Raises:
        BackendUnavailableError: the requested backend cannot run this call; the message says why.
    """
    if _thread.assumed is not None:
        return _thread.assumed
    requested = requested_backend()
    if requested is None and exporting():
        return "reference"
    return resolve(op, requested, *tensors)


def plain(op: str, backend: str | None) -> Callable | None:
    """The function of plain PyTorch that `backend` runs instead of the op; None where it has kernels."""
    package = PLAIN.get(backend)
    return None if package is None else getattr(package, op)


@functools.cache
def kernel(op: str, direction: str, backend: str) -> Callable:
    """The entry point of a kernel, "forward" or "backward", found by its name.

    All backends' have the arguments of the native schema (csrc/registration.cpp): inputs, then the outputs, which the
    caller allocates and the kernel fills.

    Raises:
        BackendUnavailableError: the kernels of this backend are not here; the message says why.
    """
    runs, reason = can_run(op, backend)
    if not runs:
        raise BackendUnavailableError(f"{op}: backend {backend!r} was requested but cannot run: {reason}")
    if backend in PLAIN:
        raise ValueError(f"{op}: backend: expected one that has kernels, got {backend!r}")
    if backend == "triton":
        return getattr(importlib.import_module(f".triton.{op}", __package__), direction)
    return getattr(torch.ops.route_kernels_native, f"{op}_{direction}").default


def exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit.trace records a graph that shall run without this package."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def resolve(op: str, requested: str | None, *tensors: torch.Tensor | None) -> str:
    """The backend that will run this call: the requested one, or the fastest that can.

    Raises:
        BackendUnavailableError: the requested backend cannot run this call; the message says why.
    """
    present = _tensors_in(tensors)
    if requested is not None:
        runs, reason = can_run(op, requested, *present)
        if not runs:
            raise BackendUnavailableError(f"{op}: backend {requested!r} was requested but cannot run: {reason}")
        return requested
    for name in _FASTEST_FIRST.get(present[0].device.type, ("reference",)):
        if can_run(op, name, *present)[0]:
            return name
    raise AssertionError("the reference backend can always run")


def _tensors_in(inputs: Sequence[object]) -> list[torch.Tensor]:
    found = []
    for given in inputs:
        if isinstance(given, torch.Tensor):
            found.append(given)
        elif isinstance(given, tuple | list):
            found += _tensors_in(given)
    return found
