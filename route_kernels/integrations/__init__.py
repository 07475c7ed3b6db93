"""Other people's DETR code on our ops: one module for each codebase, loaded when it is first asked for.

    report = rk.integrations.transformers.apply(model)   # prints what it replaced, what it left and why
    report.revert()                                      # or: with rk.integrations.transformers.apply(model): ...

`add_routing` gives the decoder of any of them a learned routing bias for training.

Nothing here imports a foreign package before a function of its module is called.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .routing.added import AddedRouting, add_routing, remove_routing

CODEBASES = ("transformers", "rfdetr", "mmcv", "ultralytics", "detrex", "deformable_detr", "bricks", "dual_r_detr")

__all__ = [*CODEBASES, "AddedRouting", "add_routing", "remove_routing"]


def __getattr__(name: str) -> ModuleType:
    if name in CODEBASES:
        return import_module(f"{__name__}.codebases.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; codebases: {', '.join(CODEBASES)}")
