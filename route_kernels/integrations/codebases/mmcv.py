"""mmcv, and with it mmdet and other codebases of OpenMMLab: deformable attention on our ops.

    report = apply()         # every model of this process
    report = apply(model)    # the attention modules of this model alone

`MultiScaleDeformableAttention` gets the fused form. Code that calls `multi_scale_deformable_attn_pytorch` (mmcv on a
CPU and for bfloat16) or `MultiScaleDeformableAttnFunction.apply` (mmcv's own CUDA kernel) gets the plain form.

Where mmcv is installed without its compiled `mmcv._ext`, nothing of `mmcv.ops`, and so of mmdet, can be imported. So
`apply()`, or `provide_extension()` alone, provides a stand-in with the two functions of deformable attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from ...ops.levels import LevelStarts, SpatialShapes
from ...ops.ms_deform_attn import ms_deform_attn
from ..codebase import PLAIN, Package, Report, applying, inside_decorators, plain_or_original, sample
from ..extension import is_not_compiled, ms_deform_attn_backward, ms_deform_attn_forward

EXTENSION = "mmcv._ext"


def provide_extension(*, verbose: bool = True) -> Report:
    """Provide a stand-in for `mmcv._ext` where mmcv is installed without it, so that it can be imported; no more.

    Its functions of deformable attention run; every other one raises NotImplementedError with its name when
    it is called.

    Returns:
        The report of what was provided: nothing where `mmcv._ext` is there; it reverts, also as a context manager.
    """
    with applying("mmcv", verbose=verbose) as report:
        _provide_extension(report)
    return report


def _provide_extension(report: Report) -> None:
    if is_not_compiled("mmcv", EXTENSION):
        report.replace(sys.modules, EXTENSION, StandIn(), name=f"import {EXTENSION}", op=PLAIN)


class StandIn(ModuleType):
    """`mmcv._ext` with every name that it may have."""

    def __init__(self) -> None:
        super().__init__(EXTENSION)
        self.__spec__ = ModuleSpec(EXTENSION, loader=None)  # `find_spec` refuses what is imported and has none

    ms_deform_attn_forward = staticmethod(ms_deform_attn_forward)

    @staticmethod
    def ms_deform_attn_backward(
        value: torch.Tensor,
        spatial_shapes: SpatialShapes,
        level_start_index: LevelStarts,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        grad_output: torch.Tensor,
        grad_value: torch.Tensor,
        grad_sampling_locations: torch.Tensor,
        grad_attention_weights: torch.Tensor,
        im2col_step: int = 64,
    ) -> None:
        """Fills the three gradients, each in the shape of its input."""
        found = ms_deform_attn_backward(
            value, spatial_shapes, level_start_index, sampling_locations, attention_weights, grad_output
        )
        for gradient, of in zip((grad_value, grad_sampling_locations, grad_attention_weights), found, strict=True):
            gradient.copy_(of)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*arguments: object, **keywords: object) -> None:
            raise NotImplementedError(
                f"{EXTENSION}.{name}: mmcv is installed without its compiled ops, of which route-kernels has those of "
                "deformable attention alone; build mmcv with its ops for this one"
            )

        return refuse


def _replace_compiled(report: Report, bindings: ModuleType) -> None:
    """The autograd function of the compiled kernel in mmcv's file, or in another codebase's of the same kind."""
    compiled = bindings.MultiScaleDeformableAttnFunction
    name = f"{compiled.__module__}.{compiled.__qualname__}.apply"
    # the casts of an autograd function stand before its forward, whose first argument is a context
    cast = inside_decorators(compiled.forward, lambda _: lambda context, *arguments: ms_deform_attn_forward(*arguments))
    plain = cast and staticmethod(plain_or_original(partial(cast, SimpleNamespace()), compiled.apply))
    report.replace(compiled, "apply", plain, name=name, op=PLAIN)


def forward(
    self: nn.Module,
    query: torch.Tensor,  # [N, B, C], or [B, N, C] with batch_first
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,  # [S, B, C], or [B, S, C] with batch_first
    identity: torch.Tensor | None = None,  # as query
    query_pos: torch.Tensor | None = None,  # as query
    key_padding_mask: torch.Tensor | None = None,  # [B, S] bool
    reference_points: torch.Tensor | None = None,  # [B, N, L, 2 or 4]
    spatial_shapes: torch.Tensor | None = None,  # [L, 2]
    level_start_index: torch.Tensor | None = None,  # [L]
    *,
    residual: torch.Tensor | None = None,
    **others: object,
) -> torch.Tensor:
    """`MultiScaleDeformableAttention.forward` by the fused op; `residual` is the identity's old name."""
    memory = query if value is None else value
    if residual is not None:
        identity = residual
    elif identity is None:
        identity = query
    if query_pos is not None:
        query = query + query_pos
    if not self.batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    output = sample(self, query, reference_points, memory, spatial_shapes, key_padding_mask, heads=self.num_heads)
    if not self.batch_first:
        output = output.transpose(0, 1)
    return self.dropout(output) + identity


def multi_scale_deformable_attn_pytorch(
    value: torch.Tensor,  # [B, S, H, D]
    value_spatial_shapes: SpatialShapes,
    sampling_locations: torch.Tensor,  # [B, N, H, L, P, 2]
    attention_weights: torch.Tensor,  # [B, N, H, L, P]
) -> torch.Tensor:
    """`ms_deform_attn` with the arguments of mmcv's function of this name."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


PACKAGE = Package(
    "mmcv", "mmcv.ops.multi_scale_deform_attn", "onedl-mmcv (or mmcv)", "MultiScaleDeformableAttention", forward,
    functions=[multi_scale_deformable_attn_pytorch], extension=EXTENSION, provide=_provide_extension,
    replace_more=_replace_compiled,
)  # fmt: skip
apply, revert = PACKAGE.apply, PACKAGE.revert
