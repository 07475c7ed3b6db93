"""Which integrations fit a model, applied to it inside a block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

from torch import nn

from .. import integrations
from ..integrations.codebase import Replaced, Report

Apply = Callable[[], Report]


def _has_class_of(package: str) -> Callable[[nn.Module], bool]:
    return lambda model: any(type(module).__module__.split(".")[0] == package for module in model.modules())


def _has_published_module(model: nn.Module) -> bool:
    compiled = "MultiScaleDeformableAttention" in sys.modules
    return compiled or any(type(module).__name__ == "MSDeformAttn" for module in model.modules())


_FITS: dict[str, Callable[[nn.Module], bool]] = {
    **{name: _has_class_of(name) for name in ("transformers", "rfdetr", "mmcv", "ultralytics", "detrex")},
    "deformable_detr": _has_published_module,
    "bricks": lambda model: "models.bricks.ms_deform_attn" in sys.modules,
    "dual_r_detr": lambda model: any(hasattr(module, "query_router") for module in model.modules()),
}
_OF_MODELS_ONLY = ("dual_r_detr",)


def what_fits(model: nn.Module) -> tuple[list[Apply], list[str]]:
    """For each integration that replaces something: how to apply it. And why others that looked right do not.

    An integration is given the model; where it finds nothing to replace in it, its whole package.
    """
    appliers, reasons = [], []
    taken: set[str] = set()
    for codebase in (name for name, fits in _FITS.items() if fits(model)):
        if codebase == "deformable_detr" and taken & {"rfdetr", "ultralytics"}:
            continue  # their modules have its name
        for arguments in ((model,), ()):
            if not arguments and codebase in _OF_MODELS_ONLY:
                continue
            try:
                apply = partial(getattr(integrations, codebase).apply, *arguments, verbose=False)
                with apply() as report:
                    replaced = bool(report.replaced)
            except (ImportError, ValueError) as error:
                reasons.append(f"{codebase}: {error}")
                continue
            if replaced:
                appliers.append(apply)
                taken.add(codebase)
                break
            reasons += [f"{codebase}: {entry.name}: {entry.reason}" for entry in report.left]
    return appliers, list(dict.fromkeys(reasons))


@contextmanager
def applied(appliers: list[Apply]) -> Iterator[list[Report]]:
    """Everything that fits, applied inside the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(apply()) for apply in appliers]


@contextmanager
def noted_use(reports: list[Report]) -> Iterator[set[Replaced]]:
    """The replaced parts that are used: those of models, and whatever else is called inside the block.

    A codebase is switched as a whole where a model holds no module that its integration knows, and models hold modules
    of codebases that they take something else from.
    """
    used: set[Replaced] = set()
    with ExitStack() as stack:
        for entry, owner, attribute in (named for report in reports for named in report.names()):
            if isinstance(owner, nn.Module):
                used.add(entry)
            elif isinstance(owner, dict):  # sys.modules: an extension, with two functions
                for name in ("ms_deform_attn_forward", "ms_deform_attn_backward"):
                    stack.enter_context(_noting(owner[attribute], name, entry, used))
            else:
                stack.enter_context(_noting(owner, attribute, entry, used))
        yield used


def _noting(owner: Any, attribute: str, entry: Replaced, used: set[Replaced]) -> Any:
    function = getattr(owner, attribute)

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        used.add(entry)
        return function(*arguments, **keywords)

    static = isinstance(vars(owner).get(attribute), staticmethod)
    return patch.object(owner, attribute, staticmethod(call) if static else call)
