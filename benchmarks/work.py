"""The least work of an op's pass, as its file in `ops` counts it and the roofline sheet reads it.

e bytes of an element, f of a factor, location, weight, offset or logit; names of sizes as in the ops' docstrings; no
masks. A multiply-add is one operation of the lanes, and two FLOP of the matrix units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Sizes = Mapping[str, int]
DIRECTIONS = ("forward", "backward")
R50_POSITIONS = 22223  # of an 800 x 1333 image, four levels


@dataclass(frozen=True)
class Work:
    """The least work of one pass."""

    memory_bytes: int
    l1_bytes: int
    matrix_flop: int
    lane_operations: int
    special_functions: int


@dataclass(frozen=True)
class Counted:
    """An op with its work by sizes, element bytes and bytes of a factor or location; `headline` is what is reported."""

    work: Callable[[Sizes, bool, int, int], Work]
    headline: Sizes
    directions: Sequence[str] = DIRECTIONS


class KernelCall(NamedTuple):
    """A call of an op's kernels, the same of every backend's, on tensors of the meta device."""

    direction: str  # "forward" or "backward"
    label: str  # dtype and sizes: unique within op and direction
    arguments: tuple[Any, ...]  # of the entry point, outputs last
    family: tuple[Any, ...] = ()  # what spilled registers are known by


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
