"""The launches that plain and fused deformable attention share. Tensors are as the ops hand them to native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..reference.precision import accumulate_dtype
from .launch import Prepared, config, kept
from .ms_deform_attn_arguments import Points, aligned, power_of_two, tile
from .ms_deform_attn_backward import ms_deform_attn_backward
from .ms_deform_attn_forward import ms_deform_attn_forward
from .ms_deform_attn_gather import ms_deform_attn_gather

LARGEST_INT32 = 2**31 - 1


def sample(value: torch.Tensor, points: Points) -> torch.Tensor:
    """The weighted sum over all points, [B, N, H * D]; value [B, S, H, D], channels contiguous."""
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, points.weight.shape[1], heads * channels)
    if output.numel() == 0:
        return output
    tensors = (value, *points.tensors())
    kept(_sample, tensors, *points.shape())((output, *tensors))
    return output


def _sample(tensors: Sequence[torch.Tensor | None], *shape: tuple[int, ...]) -> Prepared:
    value, points = tensors[0], Points(*tensors[1:], *shape)
    batch, _, heads, channels = value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    settings = tile("ms_deform_attn_forward", value, queries)
    align, strides = aligned(value.stride()[:3])
    return Prepared(
        ms_deform_attn_forward, _grid(batch, heads, queries, settings["BLOCK_N"]),
        points.levels(), queries, heads, samples, *strides, *points.strides(),
        **points.constants(channels), ALIGN=align, **settings,
    )  # fmt: skip


def sample_backward(
    prepared: Prepared,  # by `prepared_backward`
    grad_output: torch.Tensor,  # [B, N, H * D]
    value: torch.Tensor,  # [B, S, H, D]
    points: Points,
    grad_value: torch.Tensor,  # like value, contiguous
    grad_point: torch.Tensor,  # [B, N, H, K, 2]
    grad_weight: torch.Tensor,  # [B, N, H, K], of the weights after a softmax
    grad_reference: torch.Tensor | None = None,  # elements of [B, N, H, L, 2 or 4]
    deterministic: bool | None = None,
) -> None:
    """Writes every gradient; that of value by atomics, or with `deterministic` (None asks PyTorch) in a fixed order."""
    batch, positions, heads, _ = value.shape
    if grad_output.numel() == 0 or points.weight.shape[3] == 0 or positions == 0:
        for grad in (grad_value, grad_point, grad_weight, *(() if grad_reference is None else (grad_reference,))):
            grad.zero_()
        return
    sums = cell = corner_weight = None
    accumulate = accumulate_dtype(value.dtype)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        few = batch * heads * points.cells() <= LARGEST_INT32
        cell = value.new_empty(points.weight.shape, dtype=torch.int32 if few else torch.int64)
        corner_weight = value.new_empty(*points.weight.shape, 4, dtype=accumulate)
    else:
        sums = grad_value.zero_() if value.dtype == accumulate else torch.zeros_like(grad_value, dtype=accumulate)
    grads = (sums, cell, corner_weight, grad_point, grad_weight, grad_reference)
    prepared((grad_output, *grads, value, *points.tensors()))
    if deterministic:
        _gather(grad_value, grad_output, points, cell, corner_weight)
    elif sums is not grad_value:
        grad_value.copy_(sums)


def prepared_backward(tensors: Sequence[torch.Tensor | None], *shape: tuple[int, ...]) -> Prepared:
    """For `kept`: of grad_output, value and the tensors of points of this shape."""
    grad_output, value, points = tensors[0], tensors[1], Points(*tensors[2:6], *shape)
    batch, positions, heads, channels = value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    settings = tile("ms_deform_attn_backward", value, queries)
    align, strides = aligned((*grad_output.stride()[:2], *value.stride()[:3]))
    return Prepared(
        ms_deform_attn_backward, _grid(batch, heads, queries, settings["BLOCK_N"]),
        points.levels(), queries, positions, heads, samples, points.cells(), *strides, *points.strides(),
        **points.constants(channels), ALIGN=align, **settings,
    )  # fmt: skip


def _gather(grad_value, grad_output, points, cell, corner_weight) -> None:
    """The gradient of value, each element summed by one program over points in the order of their cells."""
    batch, _, heads, _ = grad_value.shape
    cell, order = torch.sort(cell.flatten(), stable=True)
    all_cells = torch.arange(batch * heads * points.cells() + 1, dtype=cell.dtype, device=cell.device)
    bounds = torch.searchsorted(cell, all_cells)
    gather = kept(_prepared_gather, (grad_value, grad_output, *points.tensors()), *points.shape())
    gather((grad_value, grad_output, order, bounds, corner_weight))


def _prepared_gather(tensors: Sequence[torch.Tensor | None], *shape: tuple[int, ...]) -> Prepared:
    grad_value, grad_output, points = tensors[0], tensors[1], Points(*tensors[2:], *shape)
    batch, positions, heads, channels = grad_value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    align, grad_strides = aligned(grad_output.stride()[:2])
    return Prepared(
        ms_deform_attn_gather, (batch * positions * heads,),
        points.levels(), positions, queries, heads, samples, points.cells(), *grad_strides,
        CHANNELS=channels, LEVELS=len(points.counts), ALIGN=align,
        BLOCK_D=power_of_two(channels), **config("ms_deform_attn_gather", grad_value.device, grad_value.dtype),
    )  # fmt: skip


def _grid(batch: int, heads: int, queries: int, block: int) -> tuple[int]:
    return (batch * heads * -(-queries // block),)
