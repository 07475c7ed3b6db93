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

import torch

from .. import backends
from ..precision import accumulate_dtype
from .contract import (
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    last_dim_contiguous,
)
from .flop import count_flop
from .levels import (
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
from .ms_deform_attn import autocast_value, contiguous_points, not_wider_than_sums, sampling_flop
from .registry import Backward
from .workspace import count_workspace, sums_bytes

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
    chosen = backends.choose(OP, value, reference_points, sampling_offsets, attention_logits, value_mask)
    inputs = (value, sizes, reference_points, sampling_offsets, attention_logits, points, value_mask)
    if isinstance(sizes, torch.Tensor):
        chosen = backends.requested_backend() if chosen == "reference" else chosen  # exported: chosen where it runs
    plain = None if isinstance(sizes, torch.Tensor) else backends.plain(OP, chosen)
    if plain is None:
        return overload(OP, sizes)(*inputs, chosen)
    check(*inputs)
    counts = _points(sizes, attention_logits, points)
    return plain(value, level_pairs(sizes), level_starts(sizes, None), *inputs[2:5], counts, value_mask)


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


def _kernel_inputs(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, value_mask):
    """The inputs as the kernels read them: each row of points contiguous, any other strides."""
    counts = _points(spatial_shapes, attention_logits, points)
    return (
        last_dim_contiguous(value),
        packed_levels(spatial_shapes, level_starts(spatial_shapes, None), counts),
        last_dim_contiguous(reference_points),
        contiguous_points(sampling_offsets),
        contiguous_points(attention_logits),
        value_mask,
    )


def _kernel(*inputs):
    *inputs, backend = inputs
    output = _new_output(*inputs)
    kernel(OP, "forward", backend, inputs[0])(*_kernel_inputs(*inputs), output)
    return output


def _new_output(value, spatial_shapes, reference_points, sampling_offsets, *others):
    check(value, spatial_shapes, reference_points, sampling_offsets, *others)
    return value.new_empty(value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3])


def _backward_kernel(grad_output, *inputs):
    *inputs, of_reference, backend = inputs
    grads = _new_grads(inputs, of_reference)
    run = kernel(OP, "backward", backend, inputs[0])
    deterministic = torch.are_deterministic_algorithms_enabled()
    run(last_dim_contiguous(grad_output), *_kernel_inputs(*inputs), deterministic, grads)
    return grads


def _new_grads(inputs, of_reference: bool) -> list[torch.Tensor]:
    value, _, reference_points, sampling_offsets, attention_logits, *_ = inputs
    wanted = (value, sampling_offsets, attention_logits, *((reference_points,) if of_reference else ()))
    return [x.new_empty(x.shape) for x in wanted]


_INPUTS = (
    "Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
    "SymInt[]? points, Tensor? value_mask"
)
_DIFFERENTIATED = ("value", "sampling_offsets", "attention_logits", "reference_points")

register_with_levels(
    OP,
    f"ms_deform_attn_fused({_INPUTS}, str? backend) -> Tensor",
    _kernel,
    lambda *inputs: _new_output(*inputs[:-1]),
    Backward(
        f"ms_deform_attn_fused_backward(Tensor grad_output, {_INPUTS}, bool reference_points_grad, str? backend) "
        "-> Tensor[]",
        _backward_kernel,
        lambda grad_output, *inputs: _new_grads(inputs, inputs[-2]),
        lambda grads, _: dict(zip(_DIFFERENTIATED, grads, strict=False)),
    ),
)


def _flop(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, *_, **__) -> int:
    return sampling_flop(attention_logits, value[-1])


def _backward_flop(grad_output, *inputs, **__) -> int:
    return 2 * _flop(*inputs)


count_flop(OP, _flop, _backward_flop)


def _backward_workspace(
    grad_output, value, sizes, reference_points, offsets, logits, points, value_mask, reference_grad, *_
) -> int:
    """The sums of value's and the logits' gradients, and the references' of each head and level."""
    dtype = accumulate_dtype(value.dtype)
    of_heads = logits.shape[:3].numel() * level_count(sizes) * reference_points.shape[3] * dtype.itemsize
    return sums_bytes(value, dtype) + sums_bytes(logits, dtype) + (of_heads if reference_grad else 0)


count_workspace(f"{OP}_backward", _backward_workspace)
