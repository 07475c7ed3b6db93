"""Deformable attention modules of other codebases: how their forward, and functions bound by value, are replaced.

They keep the four linear layers of Deformable DETR (sampling_offsets, attention_weights, value_proj, output_proj), so
that the fused op can take what the first three give. Where no kernel of ours runs a call (a device without one, a
graph that is being exported) and no backend was asked for, a replacement calls the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from types import ModuleType

import torch
from torch import nn

from .. import backends
from ..ops.levels import SpatialShapes
from ..ops.ms_deform_attn_fused import ms_deform_attn_fused
from .report import Report, inside_decorators

PLAIN, FUSED = "ms_deform_attn", "ms_deform_attn_fused"


def has_kernel(op: str, tensor: torch.Tensor) -> bool:
    """Whether a kernel of ours runs `op` on tensors like this one, or a backend was asked for; else the original is
    the better one: as fast, and exported graphs look as they always did."""
    if backends.requested_backend() is not None:
        return True
    return not backends.exporting() and backends.resolve(op, None, tensor) != "reference"


def sample(
    module: nn.Module,
    query: torch.Tensor,  # [B, N, C]
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    memory: torch.Tensor,  # [B, S, C]
    spatial_shapes: SpatialShapes,
    padding_mask: torch.Tensor | None,  # [B, S] bool, True = padding
    *,
    heads: int,
) -> torch.Tensor:
    """The fused op between a module's linear layers, output_proj included: [B, N, C]."""
    value = module.value_proj(memory).unflatten(-1, (heads, -1))
    offsets = module.sampling_offsets(query).unflatten(-1, (heads, -1, 2))
    logits = module.attention_weights(query).unflatten(-1, (heads, -1))
    sampled = ms_deform_attn_fused(value, spatial_shapes, reference_points, offsets, logits, value_mask=padding_mask)
    return module.output_proj(sampled)


def import_foreign(codebase: str, module: str, install: str) -> ModuleType:
    """The codebase's module.

    Raises:
        ImportError: it cannot be imported; the message says why, and what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{codebase}.apply: {module} cannot be imported ({error}); install {install}") from error


def replace_forward(
    report: Report, attention: type[nn.Module], fused: Callable[..., torch.Tensor], model: nn.Module | None
) -> None:
    """The forward of class `attention` by `fused`; with a model, of its modules of that class alone.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has none of that class.
    """
    if model is None:
        name = f"{attention.__module__}.{attention.__qualname__}"
        report.replace_forward(attention, forward_or_original(fused), name=name, op=FUSED)
        return
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{report.codebase}.apply: model_or_family: expected a torch.nn.Module or None, got {type(model).__name__}"
        )
    modules = {name: module for name, module in model.named_modules() if isinstance(module, attention)}
    if not modules:
        raise ValueError(
            f"{report.codebase}.apply: model_or_family: expected a model with {attention.__name__} modules, "
            f"got {type(model).__name__}, which has none"
        )
    for name, module in modules.items():
        name = name or type(module).__name__
        if type(module).forward is not attention.forward:
            report.leave(name, f"{type(module).__name__} has a forward of its own")
        else:
            report.replace_forward(module, forward_or_original(fused), name=name, op=FUSED)


def replace_function(report: Report, function: Callable, plain: Callable) -> None:
    """Every name that a loaded module binds to `function`, a core in PyTorch; importers by value included."""
    replacement = plain_or_original(partial(outside_autocast, plain), function)
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and vars(module).get(function.__name__) is function:
            report.replace(module, function.__name__, replacement, name=f"{name}.{function.__name__}", op=PLAIN)


def forward_or_original(fused: Callable[..., torch.Tensor]) -> Callable[[Callable], Callable]:
    """original -> a module's forward: `fused` where a kernel runs it."""

    def replacement(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(original)
        def forward(self: nn.Module, query: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            return (fused if has_kernel(FUSED, query) else original)(self, query, *arguments, **keywords)

        return forward

    return replacement


def outside_autocast(plain: Callable[..., torch.Tensor], value: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
    """The plain form under autocast as `grid_sample` and with it every core in PyTorch is there: in float32."""
    device = value.device.type
    if not torch.is_autocast_enabled(device):
        return plain(value, *arguments, **keywords)
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    with torch.autocast(device, enabled=False):
        return plain(value, *arguments, **keywords)


def plain_or_original(plain: Callable[..., torch.Tensor], original: Callable[..., torch.Tensor]) -> Callable | None:
    """A function of value and more: `plain` where a kernel runs it. See `inside_decorators` for those of `original`."""

    def replacement(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(original)
        def function(value: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            return (plain if has_kernel(PLAIN, value) else original)(value, *arguments, **keywords)

        return function

    return inside_decorators(original, replacement)
