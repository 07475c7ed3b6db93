"""detrex: deformable attention on our ops, and detrex without compiling it.

    report = apply()         # every model of this process
    report = apply(model)    # the attention modules of this model alone

detrex has a file of the same kind as mmcv's, over an extension `detrex._C` of its own. Where that is not compiled,
detrex has a class that only raises in the place of its attention module; so `apply()` before the first import of
detrex provides `detrex._C` with the two functions of deformable attention.
"""

from __future__ import annotations

import sys

from torch import nn

from .deformable_attention import PLAIN, import_foreign
from .extension import is_not_compiled
from .importable import MultiScaleDeformableAttention
from .mmcv import replace_attention
from .report import Report, applying, revert_all

CODEBASE = "detrex"
EXTENSION = "detrex._C"


def apply(model_or_family: nn.Module | None = None, *, verbose: bool = True) -> Report:
    """Run deformable attention of detrex on our ops.

    Args:
        model_or_family: a model, of which only the `MultiScaleDeformableAttention` modules change; None for the
            package: every such module and both functions.
        verbose: print the report.

    Returns:
        What was replaced, what was left and why; it reverts, also as a context manager.

    Raises:
        ImportError: detrex is not installed, or was imported before without its extension.
        TypeError: not a model.
        ValueError: a model without such a module.
    """
    with applying(CODEBASE, verbose=verbose) as report:
        if CODEBASE not in sys.modules and is_not_compiled(CODEBASE, EXTENSION):
            name = f"import {EXTENSION}"
            report.replace(sys.modules, EXTENSION, MultiScaleDeformableAttention, name=name, op=PLAIN)
        bindings = import_foreign(CODEBASE, "detrex.layers.multi_scale_deform_attn", "detrex")
        if not issubclass(bindings.MultiScaleDeformableAttention, nn.Module):
            raise ImportError(
                f"{CODEBASE}.apply: detrex has been imported without its extension {EXTENSION}, so it has no attention "
                "module; call apply() before the first import of detrex"
            )
        replace_attention(report, bindings, model_or_family)
    return report


def revert() -> None:
    """Put back everything that `apply` has replaced."""
    revert_all(CODEBASE)
