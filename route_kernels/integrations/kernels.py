"""The `kernels` package's way in: a layer that its `kernelize` puts in the place of `MultiScaleDeformableAttention`.

    from kernels import Mode, kernelize, use_kernel_mapping
    from route_kernels.integrations.kernels import LAYER, LayerRepository

    with use_kernel_mapping({LAYER: {"cpu": LayerRepository()}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")

Where a folder is wanted instead of an object, `write_layer_repository` makes one for `LocalLayerRepository`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..ops.ms_deform_attn import ms_deform_attn

LAYER = "MultiScaleDeformableAttention"
"""The name under which transformers decorates its layer, and under which a repository has ours."""


class MultiScaleDeformableAttention(nn.Module):
    """`ms_deform_attn` with the arguments of transformers' layer: [B, N, H * D].

    The levels are read from the list of shapes, so no tensor is; `im2col_step` is ignored. `kernels` takes the forward
    of this class alone: it must have no constructor and no other members than these.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: torch.Tensor,  # [B, S, H, D]
        value_spatial_shapes: torch.Tensor,  # [L, 2]
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: torch.Tensor,  # [L]
        sampling_locations: torch.Tensor,  # [B, N, H, L, P, 2]
        attention_weights: torch.Tensor,  # [B, N, H, L, P]
        im2col_step: int,
    ) -> torch.Tensor:
        return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


@dataclass(frozen=True)
class LayerRepository:
    """The repository that a mapping of `kernels` names for a device; it loads without a network or a file."""

    @property
    def layer_name(self) -> str:
        return LAYER

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention


def write_layer_repository(path: str | Path) -> Path:
    """Write the folder that `LocalLayerRepository(path, layer_name=LAYER)` reads; what is there is overwritten.

    Args:
        path: of the folder; it gets `build/torch-universal/`, for any PyTorch on any device.

    Returns:
        path.
    """
    path = Path(path)
    variant = path / "build" / "torch-universal"
    variant.mkdir(parents=True, exist_ok=True)
    metadata = {
        "name": "route-kernels",
        "id": "route_kernels_layers",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (variant / "__init__.py").write_text("from . import layers\n")
    (variant / "layers.py").write_text(f"from {__name__} import {LAYER}\n\n__all__ = [{LAYER!r}]\n")
    return path
