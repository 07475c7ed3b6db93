"""The two functions of the compiled `MultiScaleDeformableAttention` extension, as research code calls them.

B batch, S flattened feature positions, H heads, D channels of one head, N queries, L levels, P points of a level.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType

import torch

from .. import backends
from ..ops.contract import expect_floating, expect_same_device, expect_shape, expect_tensors
from ..ops.levels import LevelStarts, SpatialShapes, level_arguments, overload
from ..ops.ms_deform_attn import OP, check, ms_deform_attn
from .codebase import Report, plain_or_original

BACKWARD = "ms_deform_attn_backward"


def ms_deform_attn_forward(
    value: torch.Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStarts,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    im2col_step: int = 64,
    *,
    check_cuda_metadata: bool = False,
) -> torch.Tensor:
    """`ms_deform_attn` under the name and with the arguments of the extension.

    Args:
        value: [B, S, H, D], float16, bfloat16, float32 or float64. Autocast does not change it, nor did it there.
        spatial_shapes: [L, 2] integers, (h, w) of each level; with L = 0 the result is 0.
        level_start_index: [L] integers.
        sampling_locations: [B, N, H, L, P, 2].
        attention_weights: [B, N, H, L, P].
        im2col_step: accepted and ignored: any batch size runs, and nothing is worked off in steps.
        check_cuda_metadata: accepted and ignored: sizes and starts are always checked, on every device.

    Returns:
        [B, N, H * D] in the dtype of value; differentiable, too, where it is called outside an autograd function.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as `ms_deform_attn`.
    """
    expect_tensors(OP, value=value)
    with torch.autocast(value.device.type, enabled=False):
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: torch.Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStarts,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    grad_output: torch.Tensor,
    im2col_step: int = 64,
) -> list[torch.Tensor]:
    """The gradients of `ms_deform_attn_forward`; a kernel computes them from the inputs, without another forward.

    Args:
        grad_output: [B, N, H * D], dtype of value; the others as in the forward.

    Returns:
        [grad_value, grad_sampling_locations, grad_attention_weights], each in the shape and dtype of its input.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as `ms_deform_attn`.
    """
    tensors = (value, sampling_locations, attention_weights)
    expect_tensors(BACKWARD, value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    sizes, starts, _ = level_arguments(BACKWARD, value, spatial_shapes, level_start_index, None)
    check(value, sizes, starts, sampling_locations, attention_weights, None)
    batch, _, heads, channels = value.shape
    queries = ("N", sampling_locations.shape[1])
    expect_shape(BACKWARD, "grad_output", grad_output, ("B", batch), queries, ("H * D", heads * channels))
    expect_floating(BACKWARD, "grad_output", grad_output, (value.dtype,))
    expect_same_device(BACKWARD, ("value", value), grad_output=grad_output)

    chosen = backends.resolve(OP, backends.requested_backend(), *tensors, grad_output)
    inputs = (grad_output, value, sizes, starts, sampling_locations, attention_weights, None, chosen)
    return list(overload(BACKWARD, sizes)(*inputs))


def is_not_compiled(package: str, extension: str) -> bool:
    """Whether `package` is installed, and its `extension` is neither imported nor in its folder."""
    if extension in sys.modules:
        return False
    if package in sys.modules:
        folders = getattr(sys.modules[package], "__path__", None)
    else:
        folders = getattr(find_spec(package), "submodule_search_locations", None)  # which does not import it
    return folders is not None and PathFinder.find_spec(extension, folders) is None


def replace_functions(report: Report, extension: ModuleType, name: str) -> None:
    """The two functions inside a compiled extension that is imported (as `name`): other modules hold the extension.

    On devices for which this package has no kernel they go on calling the compiled ones.
    """
    for ours in (ms_deform_attn_forward, ms_deform_attn_backward):
        compiled = getattr(extension, ours.__name__)
        if compiled is ours:
            report.leave(f"{name}.{ours.__name__}", "already ours")
        else:
            replacement = plain_or_original(ours, compiled)
            report.replace(extension, ours.__name__, replacement, name=f"{name}.{ours.__name__}", op=OP)
