"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3).

    output_nh = sum_l sum_p attention_weights_nhlp bilinear(value_hl, sampling_locations_nhlp)

Bilinear with zeros outside and align_corners=False: pixel x = x_loc w - 0.5.
B batch, S flattened feature positions, H heads, D channels of one head, N queries, L levels, P points of a level, K
points over all levels.
"""

from __future__ import annotations

from functools import partial

import torch

from .. import backends, eager, reference
from ..reference.precision import accumulate_dtype, autocast_dtype
from .contract import (
    FLOATING,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    last_dim_contiguous,
)
from .levels import (
    LevelStarts,
    PointCounts,
    SpatialShapes,
    check_levels,
    check_points,
    keep_for_backward,
    kept_for_backward,
    level_arguments,
    level_count,
    level_pairs,
    level_starts,
    overload,
    register_with_levels,
)
from .registry import gradients, register, register_backward

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
    elif chosen in backends.PLAIN:
        check(*inputs)
        return backends.PLAIN[chosen].ms_deform_attn(
            value, level_pairs(sizes), level_starts(sizes, starts), sampling_locations, attention_weights,
            None if counts is None else tuple(counts),
        )  # fmt: skip
    return overload(OP, sizes)(*inputs, chosen)


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


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[B, N, H, ...] whose points of one query and head lie one after the other; B, N and H have any strides."""
    return tensor if tensor.numel() == 0 or tensor[0, 0, 0].is_contiguous() else tensor.contiguous()


def _native_inputs(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points):
    """The inputs as the kernels read them: locations [B, N, H, K, 2] and weights [B, N, H, K], rows contiguous."""
    starts = level_starts(spatial_shapes, level_start_index)
    if points is None:
        points = (sampling_locations.shape[4],) * len(starts)
        sampling_locations, attention_weights = _all_points(sampling_locations), _all_points(attention_weights)
    locations, weights = contiguous_rows(sampling_locations), contiguous_rows(attention_weights)
    return last_dim_contiguous(value), spatial_shapes, starts, locations, weights, points


def _all_points(tensor: torch.Tensor) -> torch.Tensor:
    """[B, N, H, L, P, ...] -> [B, N, H, K, ...], the points of one query and head one after the other."""
    return contiguous_rows(tensor).flatten(3, 4)


def _kernel(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points, backend):
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points)
    check(*inputs)
    return _FORWARD[backends.resolve(OP, backend, value)](*_native_inputs(*inputs))


def _fake(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points, backend):
    check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _backward_kernel(
    grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points, backend
):
    run = _BACKWARD[backends.resolve(OP, backend, value)]
    grads = tuple(x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights))
    inputs = _native_inputs(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points)
    of_points = grads[1:] if points is not None else (grad.flatten(3, 4) for grad in grads[1:])
    run(last_dim_contiguous(grad_output), *inputs, grads[0], *of_points)
    return grads


def _backward_fake(
    grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, points, backend
):
    return tuple(x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights))


def _plain_forward(formulas, value, spatial_shapes, starts, locations, weights, points):
    return formulas.ms_deform_attn(value, level_pairs(spatial_shapes), starts, locations, weights, tuple(points))


def _plain_backward(formulas, grad_output, value, spatial_shapes, starts, locations, weights, points, *grads):
    def forward(value, locations, weights):
        return _plain_forward(formulas, value, spatial_shapes, starts, locations, weights, points)

    for grad, found in zip(grads, gradients(forward, (value, locations, weights), grad_output), strict=True):
        grad.copy_(found)


def _native_forward(value, spatial_shapes, starts, locations, weights, points):
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, locations.shape[1], heads * channels)
    torch.ops.route_kernels_native.ms_deform_attn_forward(
        value, spatial_shapes, starts, locations, weights, points, output
    )
    return output


def _native_backward(grad_output, value, spatial_shapes, starts, locations, weights, points, *grads, **options):
    torch.ops.route_kernels_native.ms_deform_attn_backward(
        grad_output, value, spatial_shapes, starts, locations, weights, points, *grads, **options
    )


def _cuda_backward(*inputs_and_grads):
    _native_backward(*inputs_and_grads, deterministic=torch.are_deterministic_algorithms_enabled())


def _triton_forward(*inputs):
    from ..triton.ms_deform_attn import forward

    return forward(*inputs)


def _triton_backward(grad_output, *inputs_and_grads):
    from ..triton.ms_deform_attn import backward

    backward(grad_output, *inputs_and_grads)


_FORWARD = {
    "reference": partial(_plain_forward, reference),
    "eager": partial(_plain_forward, eager),
    "cpu": _native_forward,
    "cuda": _native_forward,
    "triton": _triton_forward,
}
_BACKWARD = {
    "reference": partial(_plain_backward, reference),
    "eager": partial(_plain_backward, eager),
    "cpu": _native_backward,
    "cuda": _cuda_backward,
    "triton": _triton_backward,
}


def _setup_context(ctx, inputs, output):
    value, spatial_shapes, level_start_index, locations, weights, points, ctx.backend = inputs
    keep_for_backward(ctx, (value, locations, weights), spatial_shapes, level_start_index, points)


def _backward(ctx, grad_output):
    (value, locations, weights), (sizes, starts, points) = kept_for_backward(ctx, 3)
    grad_value, grad_locations, grad_weights = overload("ms_deform_attn_backward", sizes)(
        grad_output, value, sizes, starts, locations, weights, points, ctx.backend
    )
    return grad_value, None, None, grad_locations, grad_weights, None, None


_INPUTS = (
    "Tensor value, SymInt[] spatial_shapes, SymInt[]? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, SymInt[]? points, str? backend"
)

register_with_levels(
    register,
    OP,
    f"ms_deform_attn({_INPUTS}) -> Tensor",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
register_with_levels(
    partial(register_backward, OP),
    OP,
    f"ms_deform_attn_backward(Tensor grad_output, {_INPUTS}) -> (Tensor value, Tensor locations, Tensor weights)",
    _backward_kernel,
    _backward_fake,
)
