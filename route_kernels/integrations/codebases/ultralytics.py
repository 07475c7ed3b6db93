"""ultralytics (RT-DETR): deformable attention on our ops.

    report = apply()         # every model of this process
    report = apply(model)    # the attention modules of this model (of an `RTDETR` object: `detector.model`)

`MSDeformAttn` gets the fused form, and code that calls `multi_scale_deformable_attn_pytorch` the plain form.
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
    refer_bbox: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    value: torch.Tensor,  # [B, S, C]
    value_shapes: Sequence[Sequence[int]],
    value_mask: torch.Tensor | None = None,  # [B, S] bool
) -> torch.Tensor:
    """`MSDeformAttn.forward` by the fused op."""
    return sample(self, query, refer_bbox, value, value_shapes, value_mask, heads=self.n_heads)


def multi_scale_deformable_attn_pytorch(
    value: torch.Tensor,  # [B, S, H, D]
    value_spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: torch.Tensor,  # [B, N, H, L P, 2]; in older versions [B, N, H, L, P, 2]
    attention_weights: torch.Tensor,  # [B, N, H, L P]; in older versions [B, N, H, L, P]
) -> torch.Tensor:
    """`ms_deform_attn` with the arguments of ultralytics' function of this name."""
    if sampling_locations.dim() == 5:
        by_level = (len(value_spatial_shapes), -1)
        sampling_locations = sampling_locations.unflatten(3, by_level)
        attention_weights = attention_weights.unflatten(3, by_level)
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


_PACKAGE = Package(
    "ultralytics", "ultralytics.nn.modules.transformer", "ultralytics", "MSDeformAttn", forward,
    functions=[multi_scale_deformable_attn_pytorch],
)  # fmt: skip
apply, revert = _PACKAGE.apply, _PACKAGE.revert
