"""Deformable attention in Triton: its launches, which the plain and the fused op share.

Tensors are as the ops hand them to native kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...precision import accumulate_dtype
from ..launch import Prepared, config, kept
from .backward import ms_deform_attn_backward, ms_deform_attn_gather
from .forward import ms_deform_attn_forward

MOST_POINTS_UNROLLED = 32
LARGEST_INT32 = 2**31 - 1

Strides = tuple[int, ...]


def forward(value, spatial_shapes, starts, locations, weights, counts):
    """[B, N, H * D] of value [B, S, H, D], locations [B, N, H, K, 2] and weights [B, N, H, K]."""
    return sample(value, Points(locations, weights, None, None, spatial_shapes, starts, counts))


def backward(grad_output, value, spatial_shapes, starts, locations, weights, counts, *grads) -> None:
    """Writes the gradients of value, locations and weights."""
    points = Points(locations, weights, None, None, spatial_shapes, starts, counts)
    _backward(grad_output, value, points, *grads)


def _backward(grad_output, value, points: Points, *grads: torch.Tensor, deterministic: bool | None = None) -> None:
    prepared = kept(prepared_backward, (grad_output, value, *points.tensors()), *points.shape())
    sample_backward(prepared, grad_output, value, points, *grads, deterministic=deterministic)


class Points(NamedTuple):
    """The points that the queries sample, and where."""

    point: torch.Tensor  # [B, N, H, K, 2]: locations or offsets
    weight: torch.Tensor  # [B, N, H, K]: weights or logits
    reference: torch.Tensor | None  # [B, N, L or 1, 2 or 4]
    value_mask: torch.Tensor | None  # [B, S]
    sizes: Sequence[int]  # (h_1, w_1, ..., h_L, w_L)
    starts: Sequence[int]  # of the levels within S
    counts: Sequence[int]  # points of each level

    @property
    def coordinates(self) -> int:
        return 0 if self.reference is None else self.reference.shape[3]

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.point, self.weight, self.reference, self.value_mask

    def shape(self) -> tuple[tuple[int, ...], ...]:
        """Sizes, starts and counts, hashable."""
        return tuple(self.sizes), tuple(self.starts), tuple(self.counts)

    def levels(self) -> tuple[int, ...]:
        """(height, width, start, points) of each level, x as 2 x + 3."""
        # 2 x + 3 is odd and above 1: Triton compiles a kernel anew for integers that are 1 or multiples of 16.
        rows = zip(self.sizes[::2], self.sizes[1::2], self.starts, self.counts, strict=True)
        return tuple(2 * number + 3 for row in rows for number in row)

    def cells(self) -> int:
        """Cells between, and beside, the pixels of all levels of one head, and one for points that are nowhere."""
        return sum((h + 1) * (w + 1) for h, w in zip(self.sizes[::2], self.sizes[1::2], strict=True)) + 1

    def strides(self) -> Strides:
        """Of points, weights, references and mask, as the kernels' arguments end."""
        reference, mask = self.reference, self.value_mask
        of_reference = (0, 0, 0) if reference is None else _strides_of_reference(reference)
        of_mask = (0, 0) if mask is None else mask.stride()
        return *self.point.stride()[:3], *self.weight.stride()[:3], *of_reference, *of_mask

    def constants(self, channels: int) -> dict[str, int]:
        """What a kernel is compiled for."""
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


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()


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
