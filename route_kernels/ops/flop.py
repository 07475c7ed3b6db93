"""Cost of our ops for PyTorch's own counters: `FlopCounterMode`, and `activation_memory_budget` of its compiler.

PyTorch counts the products of matrices, a multiply-add as two, and takes everything else for free. So are our ops
counted, those that are computed again in backward included; masks hide nothing. An op that has none counts what it does
instead: sampling the products of corners and channels, an op of single elements each operation on each of them.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
Formula = Callable[..., int]
"""FLOP of an op's call: its positional arguments with a shape for each tensor, and whatever keywords PyTorch adds."""

_formulas: dict[torch._ops.OpOverloadPacket, Formula] = {}


def count_flop(op: str, forward: Formula, backward: Formula | None = None) -> None:
    """Has PyTorch count the FLOP of the registered `op`, whichever overload, and of `<op>_backward`."""
    formulas = {op: forward} if backward is None else {op: forward, f"{op}_backward": backward}
    formulas = {getattr(torch.ops.route_kernels, name): formula for name, formula in formulas.items()}
    _formulas.update(formulas)
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER], formulas)


def _register(counter: ModuleType, formulas: dict[torch._ops.OpOverloadPacket, Formula]) -> None:
    for packet, formula in formulas.items():
        counter.register_flop_formula(packet)(formula)


class _UntilImported(importlib.abc.MetaPathFinder):
    """Waits until somebody imports PyTorch's counter, which imports Triton, and registers the formulas then."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module, _formulas)

        spec.loader.exec_module = run_and_register
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _UntilImported())
