"""What the kernels of deformable attention are launched with: sizes, strides and block sizes, for both of its ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .launch import config

MOST_POINTS_UNROLLED = 32

Strides = tuple[int, ...]


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
