"""All of multi-scale deformable attention between its linear layers, in one pass (arXiv 2010.04159, equation 3).

    weight_nhk   = softmax over all K points of attention_logits_nh
    location_nhk = reference_n + offset_nhk / (w_l, h_l)                     reference as (x, y)
    location_nhk = reference_xy_n + offset_nhk / P_l reference_wh_n 0.5      reference as (cx, cy, w, h)
    output_nh    = sum_k weight_nhk bilinear(value_hl, location_nhk)

B batch, S flattened feature positions, H heads, D channels of one head, N queries, L levels, P_l points of level l,
K points over all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .. import backends, eager, reference
from .contract import (
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    last_dim_contiguous,
)
from .levels import (
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
from .ms_deform_attn import autocast_value, contiguous_rows, not_wider_than_sums
from .registry import gradients, register, register_backward

OP = "ms_deform_attn_fused"


def ms_deform_attn_fused(
    value: torch.Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
    *,
    points: PointCounts = None,
    value_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax, sampling locations, bilinear gather and weighted sum; backward keeps nothing but these inputs.

    Args:
        value: [B, S, H, D], float16, bfloat16, float32 or float64, any strides; the levels one after the other.
        spatial_shapes: the (h, w) of each level: a sequence of pairs of ints, or an integer tensor [L, 2], which is
            read: that synchronises a GPU. In a graph of torch.compile or torch.export the kernel reads it.
        reference_points: [B, N, L or 1, 2] as (x, y) or [B, N, L or 1, 4] as (cx, cy, w, h), 0 to 1 over a level.
            Floating; float64 only with a float64 value.
        sampling_offsets: [B, N, H, K, 2] in pixels of the level (2) or in half boxes over P_l (4); dtypes as
            reference_points.
        attention_logits: [B, N, H, K], dtypes as reference_points.
        points: (P_1, ..., P_L), summing to K, as a sequence of ints or an integer tensor; None is K / L for each.
        value_mask: [B, S] bool; True positions count as zero.

    Returns:
        [B, N, H * D] in the dtype of value; coordinates, softmax and sums are float32 (float64 for float64). A sample
        whose location is NaN, infinite or outside its level adds nothing, and its location has zero gradient. Where all
        K logits of a head are -inf every weight is 0, with zero gradients; NaN or +inf among them makes all K weights
        NaN, and with them the output where a sample is inside. Under
        autocast value is cast to the autocast dtype; the others stay as they are.

    Raises:
        ValueError: a shape, level or device is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        BackendUnavailableError: an explicitly requested backend cannot run.
        RuntimeError: a second derivative was asked of a fused kernel.
    """
    expect_tensors(
        OP, value=value, reference_points=reference_points, sampling_offsets=sampling_offsets,
        attention_logits=attention_logits, **({} if value_mask is None else {"value_mask": value_mask}),
    )  # fmt: skip
    sizes, _, points = level_arguments(OP, value, spatial_shapes, None, points)
    value = autocast_value(value)
    tensors = (reference_points, sampling_offsets, attention_logits)
    chosen = backends.choose(OP, value, *tensors, value_mask)
    if isinstance(sizes, torch.Tensor):
        chosen = backends.requested_backend() if chosen == "reference" else chosen  # exported: chosen where it runs
    elif chosen in backends.PLAIN:
        check(value, sizes, *tensors, points, value_mask)
        return backends.PLAIN[chosen].ms_deform_attn_fused(
            value, level_pairs(sizes), level_starts(sizes, None), *tensors,
            _points(sizes, attention_logits, points), value_mask,
        )  # fmt: skip
    return overload(OP, sizes)(value, sizes, *tensors, points, value_mask, chosen)


def check(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask) -> None:
    """The contract, for real and fake tensors alike; the levels as flat lists of ints, or as fake tensors."""
    expect_shape(OP, "value", value, "B", "S", "H", "D")
    batch, positions, heads, _ = value.shape
    check_levels(OP, spatial_shapes, None, positions)
    expect_shape(OP, "sampling_offsets", sampling_offsets, ("B", batch), "N", ("H", heads), "K", ("", 2))
    queries, total = sampling_offsets.shape[1], sampling_offsets.shape[3]
    expect_shape(OP, "attention_logits", attention_logits, ("B", batch), ("N", queries), ("H", heads), ("K", total))
    levels = level_count(spatial_shapes)
    if points is not None:
        check_points(OP, points, levels, total)
    elif total % levels != 0 if levels else total != 0:
        raise ValueError(
            f"{OP}: points: expected the points of each level, as K={total} is no multiple of L={levels}, got None"
        )
    _check_reference_points(reference_points, batch, queries, levels)
    expect_floating(OP, "value", value)
    allowed = not_wider_than_sums(value.dtype)
    expect_floating(OP, "reference_points", reference_points, allowed)
    expect_floating(OP, "sampling_offsets", sampling_offsets, allowed)
    expect_floating(OP, "attention_logits", attention_logits, allowed)
    if value_mask is not None:
        expect_shape(OP, "value_mask", value_mask, ("B", batch), ("S", positions))
        expect_floating(OP, "value_mask", value_mask, (torch.bool,))
    expect_same_device(
        OP, ("value", value), reference_points=reference_points, sampling_offsets=sampling_offsets,
        attention_logits=attention_logits, value_mask=value_mask,
    )  # fmt: skip


def _check_reference_points(reference_points: torch.Tensor, batch: int, queries: int, levels: int) -> None:
    expect_shape(OP, "reference_points", reference_points, ("B", batch), ("N", queries), "L or 1", "2 or 4")
    if reference_points.shape[2] not in (1, levels) or reference_points.shape[3] not in (2, 4):
        raise ValueError(
            f"{OP}: reference_points: expected shape [B={batch}, N={queries}, L={levels} or 1, 2 or 4], "
            f"got {list(reference_points.shape)}"
        )


def _points(spatial_shapes: Sequence[int], attention_logits: torch.Tensor, points: Sequence[int] | None):
    levels = len(spatial_shapes) // 2
    return (attention_logits.shape[3] // max(levels, 1),) * levels if points is None else tuple(points)


def _native_inputs(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask):
    """The inputs as the kernels read them: each row of points contiguous, any other strides."""
    return (
        last_dim_contiguous(value),
        spatial_shapes,
        level_starts(spatial_shapes, None),
        last_dim_contiguous(reference_points),
        contiguous_rows(sampling_offsets),
        contiguous_rows(attention_logits),
        _points(spatial_shapes, attention_logits, points),
        value_mask,
    )


def _kernel(
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask, backend
):  # fmt: skip
    inputs = (value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask)
    check(*inputs)
    return _FORWARD[backends.resolve(OP, backend, value)](*_native_inputs(*inputs))


def _fake(value, spatial_shapes, reference_points, sampling_offsets, *settings):
    check(value, spatial_shapes, reference_points, sampling_offsets, *settings[:-1])
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_offsets.shape[1], heads * channels)


def _backward_kernel(
    grad_output, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask,
    reference_grad, backend,
):  # fmt: skip
    inputs = _native_inputs(
        value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask
    )
    run = _BACKWARD[backends.resolve(OP, backend, value)]
    return run(last_dim_contiguous(grad_output), *inputs, reference_grad)


def _backward_fake(
    grad_output, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask,
    reference_grad, backend,
):  # fmt: skip
    return _new_grads(value, sampling_offsets, attention_logits, reference_points, reference_grad)


def _new_grads(value, sampling_offsets, attention_logits, reference_points, reference_grad) -> list[torch.Tensor]:
    wanted = (value, sampling_offsets, attention_logits, *((reference_points,) if reference_grad else ()))
    return [x.new_empty(x.shape) for x in wanted]


def _plain_forward(formulas, value, spatial_shapes, *inputs):
    *tensors, points, value_mask = inputs[1:]
    pairs = level_pairs(spatial_shapes)
    return formulas.ms_deform_attn_fused(value, pairs, inputs[0], *tensors, tuple(points), value_mask)


def _plain_backward(
    formulas, grad_output, value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask,
    reference_grad,
):  # fmt: skip
    def forward(value, offsets, logits, reference_points=reference_points):
        return _plain_forward(
            formulas, value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask
        )

    inputs = (value, offsets, logits, *((reference_points,) if reference_grad else ()))
    return [grad.contiguous() for grad in gradients(forward, inputs, grad_output)]


def _native_forward(value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask):
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, offsets.shape[1], heads * channels)
    torch.ops.route_kernels_native.ms_deform_attn_fused_forward(
        value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask, output
    )
    return output


def _native_backward(
    grad_output, value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask, reference_grad,
    **options,
):  # fmt: skip
    grads = _new_grads(value, offsets, logits, reference_points, reference_grad)
    grad_reference = grads[3] if reference_grad else None
    torch.ops.route_kernels_native.ms_deform_attn_fused_backward(
        grad_output, value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask,
        grads[0], grad_reference, *grads[1:3], **options,
    )  # fmt: skip
    return grads


def _cuda_backward(*inputs):
    return _native_backward(*inputs, deterministic=torch.are_deterministic_algorithms_enabled())


def _triton_forward(*inputs):
    from ..triton.ms_deform_attn_fused import forward

    return forward(*inputs)


def _triton_backward(grad_output, *inputs):
    from ..triton.ms_deform_attn_fused import backward

    return backward(grad_output, *inputs)


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
    value, spatial_shapes, references, offsets, logits, points, value_mask, ctx.backend = inputs
    keep_for_backward(ctx, (value, references, offsets, logits, value_mask), spatial_shapes, points)


def _backward(ctx, grad_output):
    (value, references, offsets, logits, value_mask), (sizes, points) = kept_for_backward(ctx, 5)
    grads = overload("ms_deform_attn_fused_backward", sizes)(
        grad_output, value, sizes, references, offsets, logits, points, value_mask, ctx.needs_input_grad[2], ctx.backend
    )
    grad_value, grad_offsets, grad_logits, *grad_reference = grads
    return grad_value, None, grad_reference[0] if grad_reference else None, grad_offsets, grad_logits, None, None, None


_INPUTS = (
    "Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
    "SymInt[]? points, Tensor? value_mask"
)

register_with_levels(
    register,
    OP,
    f"ms_deform_attn_fused({_INPUTS}, str? backend) -> Tensor",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
register_with_levels(
    partial(register_backward, OP),
    OP,
    f"ms_deform_attn_fused_backward(Tensor grad_output, {_INPUTS}, bool reference_grad, str? backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
