"""Deformable attention in Triton: its launches, which the plain and the fused op share.

Tensors are as the ops hand them to native kernels; `levels` is (h_1, w_1, ..., h_L, w_L, starts, points of each level).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...precision import accumulate_dtype
from ..block_sizes import config
from ..launch import Grid, blocks, kept, power_of_two
from .backward import ms_deform_attn_backward, ms_deform_attn_gather
from .forward import ms_deform_attn_forward

MOST_POINTS_UNROLLED = 32
LARGEST_INT32 = 2**31 - 1

Strides = tuple[int, ...]


def forward(value, levels, locations, weights, output) -> None:
    """Fills output [B, N, H * D] of value [B, S, H, D], locations [B, N, H, K, 2] and weights [B, N, H, K]."""
    sample(value, Points(locations, weights, None, None, tuple(levels)), output)


def backward(grad_output, value, levels, locations, weights, deterministic, grads) -> None:
    """Fills the gradients of value, locations and weights."""
    points = Points(locations, weights, None, None, tuple(levels))
    grid = kept(backward_grid, (grad_output, value, *points.tensors()), points.levels)
    sample_backward(grid, grad_output, value, points, (*grads, None), deterministic)


class Points(NamedTuple):
    """The points that the queries sample, and where."""

    point: torch.Tensor  # [B, N, H, K, 2]: locations or offsets
    weight: torch.Tensor  # [B, N, H, K]: weights or logits
    reference: torch.Tensor | None  # [B, N, L or 1, 2 or 4]
    value_mask: torch.Tensor | None  # [B, S]
    levels: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """h_1, w_1, ..., h_L, w_L."""
        return self.levels[: len(self.levels) // 2]

    @property
    def counts(self) -> tuple[int, ...]:
        """The points of each level."""
        return self.levels[len(self.levels) // 4 * 3 :]

    @property
    def coordinates(self) -> int:
        return 0 if self.reference is None else self.reference.shape[3]

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.point, self.weight, self.reference, self.value_mask

    def packed_levels(self) -> tuple[int, ...]:
        """(height, width, start, points) of each level, x as 2 x + 3."""
        # 2 x + 3 is odd and above 1: Triton compiles a kernel anew for integers that are 1 or multiples of 16.
        starts = self.levels[len(self.levels) // 2 :]
        rows = zip(self.sizes[::2], self.sizes[1::2], starts, self.counts, strict=False)
        return tuple(2 * number + 3 for row in rows for number in row)

    def cells(self) -> int:
        """Cells between, and beside, the pixels of all levels of one head, and one for points that are nowhere."""
        return sum((h + 1) * (w + 1) for h, w in zip(self.sizes[::2], self.sizes[1::2], strict=True)) + 1

    def strides(self) -> Strides:
        """Strides of points, weights, references and mask, the last arguments of the kernels."""
        reference, mask = self.reference, self.value_mask
        of_reference = (0, 0, 0) if reference is None else _strides_of_reference(reference)
        of_mask = (0, 0) if mask is None else mask.stride()
        return *self.point.stride()[:3], *self.weight.stride()[:3], *of_reference, *of_mask

    def constants(self, channels: int) -> dict[str, int]:
        """The constants that a kernel is compiled for."""
        every, total = self.counts[0] if len(set(self.counts)) == 1 else 0, sum(self.counts)
        return {
            "CHANNELS": channels,
            "LEVELS": len(self.counts),
            "POINTS": every,
            "ALL_POINTS": total if self.reference is not None and total <= MOST_POINTS_UNROLLED else 0,
            "COORDINATES": self.coordinates,
        }


def _strides_of_reference(reference: torch.Tensor) -> Strides:
    batch, query, level, _ = reference.stride()
    return batch, query, 0 if reference.shape[2] == 1 else level


def aligned(strides: Strides) -> tuple[int, Strides]:
    """The largest power of two, up to 16, that divides all strides, and the strides as multiples of it.

    So many elements can make one access; the compiler sees it in the product.
    """
    bits = 16
    for stride in strides:
        bits |= stride
    align = bits & -bits
    return align, tuple(stride // align for stride in strides)


def tile(kernel_name: str, value: torch.Tensor, queries: int) -> dict[str, int]:
    """The settings of a launch; the table's BLOCK_BYTES are what one access of all threads reads of value."""
    batch, _, heads, channels = value.shape
    settings = dict(config(kernel_name, value.device, value.dtype, D=channels, rows=batch * queries * heads))
    block_d = power_of_two(channels)
    block_bytes = settings.pop("BLOCK_BYTES")
    return {**settings, "BLOCK_D": block_d, "BLOCK_N": max(block_bytes // (block_d * value.dtype.itemsize), 1)}


def sample(value: torch.Tensor, points: Points, output: torch.Tensor) -> None:
    """Fills output [B, N, H * D], the weighted sum over all points; value [B, S, H, D], channels contiguous."""
    if output.numel() == 0:
        return
    tensors = (value, *points.tensors())
    grid = kept(_forward_grid, tensors, points.levels)
    ms_deform_attn_forward[grid](output, *tensors)


def _forward_grid(tensors: Sequence[torch.Tensor | None], levels: tuple[int, ...]) -> Grid:
    value, points = tensors[0], Points(*tensors[1:], levels)
    batch, _, heads, channels = value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    settings = tile("ms_deform_attn_forward", value, queries)
    align, strides = aligned(value.stride()[:3])
    return Grid(
        (batch * heads * blocks(queries, settings["BLOCK_N"]),),
        points.packed_levels(), queries, heads, samples, *strides, *points.strides(),
        **points.constants(channels), ALIGN=align, **settings,
    )  # fmt: skip


def sample_backward(
    grid: Grid,  # by `backward_grid`
    grad_output: torch.Tensor,  # [B, N, H * D]
    value: torch.Tensor,  # [B, S, H, D]
    points: Points,
    grads: Sequence[torch.Tensor | None],
    deterministic: bool,
) -> None:
    """Fills every gradient; that of value by atomics, or with `deterministic` in a fixed order.

    grads: of value, like value, contiguous; of point [B, N, H, K, 2]; of weight [B, N, H, K] after a softmax; and,
    or None, of reference, elements of [B, N, H, L, 2 or 4].
    """
    batch, positions, heads, _ = value.shape
    grad_value, *of_points = grads
    if grad_output.numel() == 0 or points.weight.shape[3] == 0 or positions == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    sums = cell = corner_weight = None
    accumulate = accumulate_dtype(value.dtype)
    if deterministic:
        few = batch * heads * points.cells() <= LARGEST_INT32
        cell = value.new_empty(points.weight.shape, dtype=torch.int32 if few else torch.int64)
        corner_weight = value.new_empty(*points.weight.shape, 4, dtype=accumulate)
    else:
        sums = grad_value.zero_() if value.dtype == accumulate else torch.zeros_like(grad_value, dtype=accumulate)
    ms_deform_attn_backward[grid](grad_output, sums, cell, corner_weight, *of_points, value, *points.tensors())
    if deterministic:
        _gather(grad_value, grad_output, points, cell, corner_weight)
    elif sums is not grad_value:
        grad_value.copy_(sums)


def backward_grid(tensors: Sequence[torch.Tensor | None], levels: tuple[int, ...]) -> Grid:
    """For `kept`: of grad_output, value and the tensors of points of these levels."""
    grad_output, value, points = tensors[0], tensors[1], Points(*tensors[2:6], levels)
    batch, positions, heads, channels = value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    settings = tile("ms_deform_attn_backward", value, queries)
    align, strides = aligned((*grad_output.stride()[:2], *value.stride()[:3]))
    return Grid(
        (batch * heads * blocks(queries, settings["BLOCK_N"]),),
        points.packed_levels(), queries, positions, heads, samples, points.cells(), *strides, *points.strides(),
        **points.constants(channels), ALIGN=align, **settings,
    )  # fmt: skip


def _gather(grad_value, grad_output, points: Points, cell, corner_weight) -> None:
    """The gradient of value, each element summed by one program over points in the order of their cells."""
    batch, _, heads, _ = grad_value.shape
    cell, order = torch.sort(cell.flatten(), stable=True)
    all_cells = torch.arange(batch * heads * points.cells() + 1, dtype=cell.dtype, device=cell.device)
    bounds = torch.searchsorted(cell, all_cells)
    grid = kept(_gather_grid, (grad_value, grad_output, *points.tensors()), points.levels)
    ms_deform_attn_gather[grid](grad_value, grad_output, order, bounds, corner_weight)


def _gather_grid(tensors: Sequence[torch.Tensor | None], levels: tuple[int, ...]) -> Grid:
    grad_value, grad_output, points = tensors[0], tensors[1], Points(*tensors[2:], levels)
    batch, positions, heads, channels = grad_value.shape
    queries, samples = points.weight.shape[1], points.weight.shape[3]
    align, grad_strides = aligned(grad_output.stride()[:2])
    return Grid(
        (batch * positions * heads,),
        points.packed_levels(), positions, queries, heads, samples, points.cells(), *grad_strides,
        CHANNELS=channels, LEVELS=len(points.counts), ALIGN=align,
        BLOCK_D=power_of_two(channels), **config("ms_deform_attn_gather", grad_value.device, grad_value.dtype),
    )  # fmt: skip
