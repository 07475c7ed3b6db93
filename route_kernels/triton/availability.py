"""Whether Triton kernels can run here, and why not. Imports triton only when asked."""

from __future__ import annotations

import functools
import os
import pkgutil
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..graphs import constant_in_graphs
from ..precision import FLOATING

OLDEST = (3, 5)
OLDEST_CAPABILITY = (8, 0)

OPS = frozenset(file.name for file in pkgutil.iter_modules([os.path.dirname(__file__)]))
"""An op without a file here has no kernels."""


class Limits(NamedTuple):
    """The tensors that an op's kernels take."""

    dtypes: tuple[torch.dtype, ...] = FLOATING
    widest: Mapping[int, tuple[str, int]] = {}
    """By the dimensions of a tensor, the name and the most of its last one."""


LIMITS: dict[str, Limits] = {}
"""Declared by the ops that have some."""


def limits(op: str) -> Limits:
    """The tensors that the kernels of `op` take."""
    return LIMITS.get(op, Limits())


def can_run(op: str, *tensors: torch.Tensor) -> tuple[bool, str]:
    """Whether the Triton kernel of `op` takes these tensors, and the reason; without any, whether it could run here."""
    if op not in OPS:
        return False, f"this version has no triton kernel for {op}"
    devices = {tensor.device for tensor in tensors} or {_most_capable_device()}
    for device in devices:
        obstacle = _obstacle(device.type, device.index)
        if obstacle:
            return False, obstacle
    dtypes, widest = limits(op)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return False, f"the triton kernel takes {names}, got {tensor.dtype}"
        if tensor.dim() in widest:
            name, most = widest[tensor.dim()]
            if tensor.shape[-1] > most:
                return False, f"the triton kernel takes {name} up to {most}, got {tensor.shape[-1]}"
    return True, _description()


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before triton was imported."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.sum, InterpretedFunction)


@constant_in_graphs
def _description() -> str:
    import triton

    return f"Triton {triton.__version__} kernel" + (" in the interpreter" if interpreted() else "")


def _most_capable_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@constant_in_graphs
def _obstacle(device_type: str, index: int | None) -> str:
    """Why no Triton kernel runs on this device; "" where one does."""
    return _known_obstacle(device_type, index)


@functools.cache
def _known_obstacle(device_type: str, index: int | None) -> str:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); run `pip install 'triton>=3.5'`"
    if version_of(triton.__version__) < OLDEST:
        return f"Triton {triton.__version__} is installed, the kernels need {'.'.join(map(str, OLDEST))} or newer"
    if interpreted():
        return "" if device_type in ("cpu", "cuda") else f"Triton's interpreter does not run on {device_type} tensors"
    if device_type == "cpu":
        where = "got one on cpu" if torch.cuda.is_available() else "and there is no such GPU here"
        return (
            f"the triton kernels take CUDA and HIP tensors, {where} "
            "(TRITON_INTERPRET=1, set before the start, runs them on the CPU to test them)"
        )
    if device_type != "cuda":
        return f"the triton kernels take CUDA and HIP tensors, got one on {device_type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(index)
        return f"the triton kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return ""


def version_of(text: str) -> tuple[int, ...]:
    """ "3.7.1+git" -> (3, 7, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])
