"""Deformable-DETR and what builds on it (DAB, DN, DINO, MaskDINO, Mask2Former, H-DETR, DAC-DETR, ...) on our ops.

    deformable_detr.apply()                  # before they are imported: `import MultiScaleDeformableAttention` is ours
    report = deformable_detr.apply(model)    # then, their MSDeformAttn modules in the fused form

The first provides the extension that these codebases would have to compile. With
`python -m route_kernels.shim main.py ...` nothing of theirs is edited.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from ..codebase import PLAIN, Report, applying, revert_all, sample
from ..convention import Convention, fuse
from ..extension import replace_functions
from ..importable import MultiScaleDeformableAttention

CODEBASE = "deformable_detr"
EXTENSION = "MultiScaleDeformableAttention"


def forward(
    self: nn.Module,
    query: torch.Tensor,  # [B, N, C]
    reference_points: torch.Tensor,  # [B, N, L, 2 or 4]
    input_flatten: torch.Tensor,  # [B, S, C]
    input_spatial_shapes: torch.Tensor,  # [L, 2]
    input_level_start_index: torch.Tensor,  # [L], which must say that the levels lie one after the other
    input_padding_mask: torch.Tensor | None = None,  # [B, S] bool, True = padding
) -> torch.Tensor:
    """`MSDeformAttn.forward` by the fused op: [B, N, C]."""
    return sample(
        self, query, reference_points, input_flatten, input_spatial_shapes, input_padding_mask, heads=self.n_heads
    )


MS_DEFORM_ATTN = Convention(forward, heads="n_heads", levels="n_levels")


def apply(model: nn.Module | None = None, *, verbose: bool = True) -> Report:
    """Provide the module `MultiScaleDeformableAttention`; with a model, fuse its `MSDeformAttn` modules.

    Where the compiled extension has been imported already, its two functions are replaced inside it, since other
    modules hold it; on devices for which this package has no kernel they go on calling the compiled ones.

    Args:
        model: whose modules `MSDeformAttn` shall run as one fused call between their linear layers: no
            sampling locations, no softmaxed weights, no masked copy of value, no float32 copy of a float16 value.
        verbose: print the report.

    Returns:
        The report of what was replaced, what was left and why; it reverts, also as a context manager.

    Raises:
        TypeError: `model` is no module.
    """
    with applying(CODEBASE, verbose=verbose) as report:
        imported = sys.modules.get(EXTENSION)
        if imported is None:
            report.replace(sys.modules, EXTENSION, MultiScaleDeformableAttention, name=f"import {EXTENSION}", op=PLAIN)
        else:
            replace_functions(report, imported, EXTENSION)
        if model is not None:
            fuse(report, model, MS_DEFORM_ATTN)
    return report


def revert() -> None:
    """Put back everything that `apply` has replaced."""
    revert_all(CODEBASE)
