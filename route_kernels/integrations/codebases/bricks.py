"""Relation-DETR, Salience-DETR and Dual-R-DETR (detectors built from `models.bricks`) on our ops.

from models.bricks import ms_deform_attn    # theirs, from the root of their repository
report = apply()                            # every model: where they call their extension or their PyTorch form
report = apply(model)                       # then, this model's attention modules in the fused form
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from ...ops.ms_deform_attn import ms_deform_attn
from ..codebase import Report, applying, replace_function, revert_all, sample
from ..convention import Convention, fuse
from ..extension import replace_functions

CODEBASE = "bricks"
MODULE = "models.bricks.ms_deform_attn"
FUNCTION = "multi_scale_deformable_attn_pytorch"
EXTENSION = "_C"
"""Compiled when their module is imported on a machine with a GPU; None elsewhere."""


def forward(
    self: nn.Module,
    query: torch.Tensor,  # [B, N, C]
    reference_points: torch.Tensor,  # [B, N, L, 2 or 4]
    value: torch.Tensor,  # [B, S, C]
    spatial_shapes: torch.Tensor,  # [L, 2]
    level_start_index: torch.Tensor,  # [L], which must say that the levels lie one after the other
    key_padding_mask: torch.Tensor | None,  # [B, S] bool, True = padding
) -> torch.Tensor:
    """`MultiScaleDeformableAttention.forward` by the fused op: [B, N, C]."""
    return sample(self, query, reference_points, value, spatial_shapes, key_padding_mask, heads=self.num_heads)


MULTI_SCALE_DEFORMABLE_ATTENTION = Convention(forward, heads="num_heads", levels="num_levels")


def apply(model: nn.Module | None = None, *, verbose: bool = True) -> Report:
    """Run the deformable attention of `models.bricks` on our ops.

    Args:
        model: whose modules `MultiScaleDeformableAttention` shall run as one fused call between their linear layers:
            no sampling locations, no softmaxed weights, no masked copy of value, no float32 copy of value.
        verbose: print the report.

    Returns:
        The report of what was replaced, what was left and why; it reverts, also as a context manager.

    Raises:
        ImportError: `models.bricks.ms_deform_attn` cannot be imported, or is another repository's.
        TypeError: `model` is no module.
    """
    try:
        bindings = import_module(MODULE)
    except ImportError as error:
        raise ImportError(
            f"{CODEBASE}.apply: {MODULE} cannot be imported ({error}); call it where the repository of Relation-, "
            "Salience- or Dual-R-DETR is on sys.path, after importing theirs"
        ) from error
    if not hasattr(bindings, FUNCTION):
        raise ImportError(f"{CODEBASE}.apply: {MODULE} has no {FUNCTION}: {bindings} is of another repository")
    with applying(CODEBASE, verbose=verbose) as report:
        original = getattr(bindings, FUNCTION)
        replace_function(report, original, multi_scale_deformable_attn_pytorch)
        if getattr(bindings, EXTENSION, None) is not None:
            replace_functions(report, getattr(bindings, EXTENSION), f"{MODULE}.{EXTENSION}")
        if model is not None:
            fuse(report, model, MULTI_SCALE_DEFORMABLE_ATTENTION)
    return report


def revert() -> None:
    """Put back everything that `apply` has replaced."""
    revert_all(CODEBASE)


def multi_scale_deformable_attn_pytorch(
    value: torch.Tensor,  # [B, S, H, D]
    value_spatial_shapes: torch.Tensor,  # [L, 2]
    sampling_locations: torch.Tensor,  # [B, N, H, L, P, 2]
    attention_weights: torch.Tensor,  # [B, N, H, L, P]
) -> torch.Tensor:
    """`ms_deform_attn` with the arguments of their function of this name."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)
