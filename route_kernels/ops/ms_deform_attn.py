"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3).

    output_nh = sum_l sum_p attention_weights_nhlp bilinear(value_hl, sampling_locations_nhlp)

Bilinear with zeros outside and align_corners=False: pixel x = x_loc w - 0.5.
B batch, S flattened feature positions, H heads, D channels of one head, N queries, L levels, P points of a level, K
points over all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import backends
from ..precision import FLOATING, accumulate_dtype, autocast_dtype
from .contract import (
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    last_dim_contiguous,
)
from .flop import count_flop
from .levels import (
    LevelStarts,
    PointCounts,
    SpatialShapes,
    check_levels,
    check_points,
    kernel,
    level_arguments,
    level_count,
    level_pairs,
    level_starts,
    overload,
    packed_levels,
    register_with_levels,
)
from .registry import Backward
from .workspace import count_workspace, sums_bytes

OP = "ms_deform_attn"


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStarts,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    *,
    points: PointCounts = None,
) -> torch.Tensor:
    """Weighted sum of bilinear samples of several feature levels, with the calling convention of Deformable DETR.

    Args:
        value: [B, S, H, D], float16, bfloat16, float32 or float64, any strides.
        spatial_shapes: the (h, w) of each level: a sequence of pairs of ints, or an integer tensor [L, 2], which is
            read: that synchronises a GPU. In a graph of torch.compile or torch.export the kernel reads it.
        level_start_index: where each level starts in S: a sequence of ints, an integer tensor [L], or None for one
            level after the other.
        sampling_locations: [B, N, H, L, P, 2] as (x, y), 0 to 1 over a level. Floating; float64 only with a float64
            value.
        attention_weights: [B, N, H, L, P], dtypes as sampling_locations.
        points: (P_1, ..., P_L), where levels differ, as a sequence of ints or an integer tensor: then
            sampling_locations is [B, N, H, K, 2] and attention_weights [B, N, H, K], level after level,
            K = P_1 + ... + P_L.

    Returns:
        [B, N, H * D] in the dtype of value; coordinates and sums are float32 (float64 for float64). A sample whose
        location is NaN, infinite or outside its level adds nothing and has zero gradient. Under autocast value
        is cast to the autocast dtype; locations and weights stay as they are.

    Raises:
        ValueError: a shape, level or device is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        BackendUnavailableError: an explicitly requested backend cannot run.
        RuntimeError: a second derivative was asked of a fused kernel.
    """
    expect_tensors(OP, value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    sizes, starts, counts = level_arguments(OP, value, spatial_shapes, level_start_index, points)
    value = autocast_value(value)
    chosen = backends.choose(OP, value, sampling_locations, attention_weights)
    inputs = (value, sizes, starts, sampling_locations, attention_weights, counts)
    if isinstance(sizes, torch.Tensor):
        chosen = backends.requested_backend() if chosen == "reference" else chosen  # exported: chosen where it runs
    plain = None if isinstance(sizes, torch.Tensor) else backends.plain(OP, chosen)
    if plain is None:
        return overload(OP, sizes)(*inputs, chosen)
    check(*inputs)
    counts = None if counts is None else tuple(counts)
    return plain(value, level_pairs(sizes), level_starts(sizes, starts), sampling_locations, attention_weights, counts)


def check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points) -> None:
    """The contract, for real and fake tensors alike; the levels as flat lists of ints, or as fake tensors."""
    expect_shape(OP, "value", value, "B", "S", "H", "D")
    batch, positions, heads, _ = value.shape
    check_levels(OP, spatial_shapes, level_start_index, positions)
    levels = level_count(spatial_shapes)
    samples = (("L", levels), "P") if points is None else ("K",)
    expect_shape(OP, "sampling_locations", sampling_locations, ("B", batch), "N", ("H", heads), *samples, ("", 2))
    queries, last = sampling_locations.shape[1], sampling_locations.shape[-2]
    if points is not None:
        check_points(OP, points, levels, last)
    samples = (("L", levels), ("P", last)) if points is None else (("K", last),)
    expect_shape(OP, "attention_weights", attention_weights, ("B", batch), ("N", queries), ("H", heads), *samples)
    expect_floating(OP, "value", value)
    allowed = not_wider_than_sums(value.dtype)
    expect_floating(OP, "sampling_locations", sampling_locations, allowed)
    expect_floating(OP, "attention_weights", attention_weights, allowed)
    expect_same_device(OP, ("value", value), sampling_locations=sampling_locations, attention_weights=attention_weights)


def not_wider_than_sums(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The floating dtypes that the accumulation for a value of `dtype` holds exactly."""
    return FLOATING if accumulate_dtype(dtype) == torch.float64 else FLOATING[:3]


def autocast_value(value: torch.Tensor) -> torch.Tensor:
    """value in the autocast dtype where autocast is on; float64 is left alone."""
    dtype = autocast_dtype(value.device)
    return value if dtype is None or not value.is_floating_point() or value.dtype == torch.float64 else value.to(dtype)


def contiguous_points(tensor: torch.Tensor) -> torch.Tensor:
    """[B, N, H, ...] whose points of one query and head lie one after the other; B, N and H have any strides."""
    return tensor if tensor.numel() == 0 or tensor[0, 0, 0].is_contiguous() else tensor.contiguous()


def _kernel_inputs(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points):
    """The inputs as the kernels read them: locations [B, N, H, K, 2] and weights [B, N, H, K], rows contiguous."""
    if points is None:
        points = (sampling_locations.shape[4],) * level_count(spatial_shapes)
        sampling_locations, attention_weights = _all_points(sampling_locations), _all_points(attention_weights)
    levels = packed_levels(spatial_shapes, level_starts(spatial_shapes, level_start_index), points)
    locations, weights = contiguous_points(sampling_locations), contiguous_points(attention_weights)
    return last_dim_contiguous(value), levels, locations, weights


def _all_points(tensor: torch.Tensor) -> torch.Tensor:
    """[B, N, H, L, P, ...] -> [B, N, H, K, ...], the points of one query and head one after the other."""
    return contiguous_points(tensor).flatten(3, 4)


def _kernel(*inputs):
    *inputs, backend = inputs
    output = _new_output(*inputs)
    kernel(OP, "forward", backend, inputs[0])(*_kernel_inputs(*inputs), output)
    return output


def _new_output(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points):
    check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points)
    return value.new_empty(*value.shape[:1], sampling_locations.shape[1], value.shape[2] * value.shape[3])


def _backward_kernel(grad_output, *inputs):
    *inputs, backend = inputs
    grads = _new_grads(*inputs)
    of_points = grads[1:] if inputs[-1] is not None else (grad.flatten(3, 4) for grad in grads[1:])
    run = kernel(OP, "backward", backend, inputs[0])
    deterministic = torch.are_deterministic_algorithms_enabled()
    run(last_dim_contiguous(grad_output), *_kernel_inputs(*inputs), deterministic, [grads[0], *of_points])
    return grads


def _new_grads(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points):
    return tuple(x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights))


_INPUTS = (
    "Tensor value, SymInt[] spatial_shapes, SymInt[]? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, SymInt[]? points, str? backend"
)

register_with_levels(
    OP,
    f"ms_deform_attn({_INPUTS}) -> Tensor",
    _kernel,
    lambda *inputs: _new_output(*inputs[:-1]),
    Backward(
        f"ms_deform_attn_backward(Tensor grad_output, {_INPUTS}) -> (Tensor value, Tensor locations, Tensor weights)",
        _backward_kernel,
        lambda grad_output, *inputs: _new_grads(*inputs[:-1]),
        lambda grads, _: dict(zip(("value", "sampling_locations", "attention_weights"), grads, strict=True)),
    ),
)


def sampling_flop(samples: Sequence[int], channels: int) -> int:
    """The products of four corners and all channels, for samples of any shape [B, N, H, ...]."""
    return 8 * channels * math.prod(samples)


def _flop(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, *_, **__) -> int:
    return sampling_flop(attention_weights, value[-1])


def _backward_flop(grad_output, *inputs, **__) -> int:
    """dO . v of every corner, for the weights, and dO times its weight, for the value."""
    return 2 * _flop(*inputs)


count_flop(OP, _flop, _backward_flop)


def _backward_workspace(grad_output, value, *_) -> int:
    return sums_bytes(value, accumulate_dtype(value.dtype))


count_workspace(f"{OP}_backward", _backward_workspace)
