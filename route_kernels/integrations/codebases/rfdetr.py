"""rfdetr (RF-DETR's own package): deformable attention on our ops.

    report = apply()         # every model of this process
    report = apply(model)    # the attention modules of this model (of an `RFDETR` object: `detector.model.model`)

`MSDeformAttn` gets the fused form, which takes the projected value as it is: the original first copies it to
[B, H, D, S]. Code that calls its core `ms_deform_attn_core_pytorch` gets the plain form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...ops.ms_deform_attn import ms_deform_attn
from ..codebase import Package, sample


def forward(
    self: nn.Module,
    query: torch.Tensor,  # [B, N, C]
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    input_flatten: torch.Tensor,  # [B, S, C]
    input_spatial_shapes: torch.Tensor,  # [L, 2]
    input_level_start_index: torch.Tensor,  # [L]
    input_padding_mask: torch.Tensor | None = None,  # [B, S] bool
    input_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """`MSDeformAttn.forward` by the fused op, on sizes as Python ints where there are some."""
    shapes = input_spatial_shapes if input_spatial_shapes_hw is None else input_spatial_shapes_hw
    return sample(self, query, reference_points, input_flatten, shapes, input_padding_mask, heads=self.n_heads)


def ms_deform_attn_core_pytorch(
    value: torch.Tensor,  # [B, H, D, S]
    value_spatial_shapes: torch.Tensor,  # [L, 2]
    sampling_locations: torch.Tensor,  # [B, N, H, L, P, 2], or [B, N, H, L P, 2] after .export()
    attention_weights: torch.Tensor,  # [B, N, H, L P]
    value_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """`ms_deform_attn` with the arguments of rfdetr's function of this name."""
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    by_level = (len(shapes), -1)
    locations = sampling_locations if sampling_locations.dim() == 6 else sampling_locations.unflatten(3, by_level)
    # copied once, here: the op would copy a view whose channels are not adjacent in both of its passes
    value = value.permute(0, 3, 1, 2).contiguous()
    return ms_deform_attn(value, shapes, None, locations, attention_weights.unflatten(-1, by_level))


_PACKAGE = Package(
    "rfdetr", "rfdetr.models.ops.modules.ms_deform_attn", "rfdetr", "MSDeformAttn", forward,
    functions=[ms_deform_attn_core_pytorch],
)  # fmt: skip
apply, revert = _PACKAGE.apply, _PACKAGE.revert
