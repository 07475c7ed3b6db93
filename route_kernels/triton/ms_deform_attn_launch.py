"""The launches that plain and fused deformable attention share. Tensors are as the ops hand them to native kernels."""

from __future__ import annotations

import torch

from ..reference.precision import accumulate_dtype
from .launch import config, launch
from .ms_deform_attn_arguments import Points, aligned, power_of_two, tile
from .ms_deform_attn_backward import ms_deform_attn_backward
from .ms_deform_attn_forward import ms_deform_attn_forward
from .ms_deform_attn_gather import ms_deform_attn_gather

LARGEST_INT32 = 2**31 - 1


def sample(value: torch.Tensor, points: Points) -> torch.Tensor:
    """The weighted sum over all points, [B, N, H * D]; value [B, S, H, D], channels contiguous."""
    batch, _, heads, channels = value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    output = value.new_empty(batch, queries, heads * channels)
    if output.numel() == 0:
        return output
    settings = tile("ms_deform_attn_forward", value, queries)
    align, strides = aligned(value.stride()[:3])
    launch(
        ms_deform_attn_forward, _grid(batch, heads, queries, settings["BLOCK_N"]),
        output, value, *points.tensors(), points.levels(), queries, heads, samples, *strides, *points.strides(),
        **points.constants(channels), ALIGN=align, **settings,
    )  # fmt: skip
    return output


def sample_backward(
    grad_output: torch.Tensor,  # [B, N, H * D]
    value: torch.Tensor,  # [B, S, H, D]
    points: Points,
    grad_value: torch.Tensor,  # like value, contiguous
    grad_point: torch.Tensor,  # [B, N, H, K, 2]
    grad_weight: torch.Tensor,  # [B, N, H, K], of the weights after a softmax
    grad_reference: torch.Tensor | None = None,  # [B, N, H, L, 2 or 4]
    deterministic: bool | None = None,
) -> None:
    """Writes every gradient; that of value by atomics, or with `deterministic` (None asks PyTorch) in a fixed order."""
    batch, positions, heads, channels = value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    if grad_output.numel() == 0 or samples == 0 or positions == 0:
        for grad in (grad_value, grad_point, grad_weight, *(() if grad_reference is None else (grad_reference,))):
            grad.zero_()
        return
    sums = cell = corner_weight = None
    cells = _cells(points)
    accumulate = accumulate_dtype(value.dtype)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        cell = value.new_empty(
            points.weight.shape, dtype=torch.int32 if batch * heads * cells <= LARGEST_INT32 else torch.int64
        )
        corner_weight = value.new_empty(*points.weight.shape, 4, dtype=accumulate)
    else:
        sums = grad_value.zero_() if value.dtype == accumulate else torch.zeros_like(grad_value, dtype=accumulate)
    settings = tile("ms_deform_attn_backward", value, queries)
    align, strides = aligned((*grad_output.stride()[:2], *value.stride()[:3]))
    launch(
        ms_deform_attn_backward, _grid(batch, heads, queries, settings["BLOCK_N"]),
        grad_output, sums, cell, corner_weight, grad_point, grad_weight, grad_reference, value, *points.tensors(),
        points.levels(), queries, positions, heads, samples, cells, *strides, *points.strides(),
        **points.constants(channels), ALIGN=align,
        **settings,
    )  # fmt: skip
    if deterministic:
        _gather(grad_value, grad_output, points, cell, corner_weight, cells)
    elif sums is not grad_value:
        grad_value.copy_(sums)


def _gather(grad_value, grad_output, points, cell, corner_weight, cells) -> None:
    """The gradient of value, each element summed by one program over points in the order of their cells."""
    batch, positions, heads, channels = grad_value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    cell, order = torch.sort(cell.flatten(), stable=True)
    all_cells = torch.arange(batch * heads * cells + 1, dtype=cell.dtype, device=cell.device)
    align, grad_strides = aligned(grad_output.stride()[:2])
    launch(
        ms_deform_attn_gather, (batch * positions * heads,),
        grad_value, grad_output, order, torch.searchsorted(cell, all_cells), corner_weight,
        points.levels(), positions, queries, heads, samples, cells, *grad_strides,
        CHANNELS=channels, LEVELS=len(points.counts), ALIGN=align,
        BLOCK_D=power_of_two(channels), **config("ms_deform_attn_gather", grad_value.device, grad_value.dtype),
    )  # fmt: skip


def _grid(batch: int, heads: int, queries: int, block: int) -> tuple[int]:
    return (batch * heads * -(-queries // block),)


def _cells(points: Points) -> int:
    """Cells between, and beside, the pixels of all levels of one head, and one for points that are nowhere."""
    return sum((h + 1) * (w + 1) for h, w in zip(points.sizes[::2], points.sizes[1::2], strict=True)) + 1
