"""Bytes that Triton's launches allocate inside a call and nobody else sees, declared beside each op for planners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_formulas: dict[str, Callable[..., int]] = {}


def count_workspace(op: str, formula: Callable[..., int]) -> None:
    """Declares the bytes inside a call of the registered `op`, of its positional arguments."""
    _formulas[op] = formula


def workspace_bytes(overload: Any, arguments: Sequence[Any]) -> int:
    """Bytes that Triton's launches allocate inside one call of an overload such as `torch.ops.aten.mm.default`.

    arguments: positional, as a dispatch mode gets them. 0 for ops that are not ours, and for those that return their
        workspace as an output.
    """
    if getattr(overload, "namespace", None) != "route_kernels":
        return 0
    formula = _formulas.get(overload._schema.name.partition("::")[2])
    return 0 if formula is None else formula(*arguments)


def sums_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes that a gradient is summed in, where that is another dtype than its own."""
    return 0 if tensor.dtype == dtype else tensor.numel() * dtype.itemsize
