"""detrex: deformable attention on our ops.

    report = apply()         # every model of this process
    report = apply(model)    # the attention modules of this model alone

detrex has a file of the same kind as mmcv's, over a compiled `detrex._C` of its own.
"""

from __future__ import annotations

from torch import nn

from .attention_module import import_foreign
from .mmcv import replace_attention
from .report import Report, applying, revert_all

CODEBASE = "detrex"


def apply(model_or_family: nn.Module | None = None, *, verbose: bool = True) -> Report:
    """Run deformable attention of detrex on our ops.

    Args:
        model_or_family: a model, of which only the `MultiScaleDeformableAttention` modules change; None for the
            package: every such module and both functions.
        verbose: print the report.

    Returns:
        What was replaced, what was left and why; it reverts, also as a context manager.

    Raises:
        ImportError: detrex, or its compiled `detrex._C`, is not installed.
        TypeError: not a model.
        ValueError: a model without such a module.
    """
    bindings = import_foreign(CODEBASE, "detrex.layers.multi_scale_deform_attn", "detrex with its compiled ops")
    with applying(CODEBASE, verbose=verbose) as report:
        replace_attention(report, bindings, model_or_family)
    return report


def revert() -> None:
    """Put back everything that `apply` has replaced."""
    revert_all(CODEBASE)
