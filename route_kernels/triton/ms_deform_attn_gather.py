"""The gradient of value in a fixed order: a program sums over the points around one position of one head.

The points come sorted by the cell they fall into. A position is a corner of four cells, so its sum has four runs of
points, and nothing is added by two programs: bit for bit the same every time.
"""

import triton
import triton.language as tl

from .bilinear import level_at

UNSPECIALIZED = ("positions", "queries", "heads", "points", "cells", "stride_gb", "stride_gn")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def ms_deform_attn_gather(
    grad_value,  # [B, S, H, D]
    grad_output,  # [B, N, H, D]; ALIGN divides its strides, which are given as multiples of it
    order,  # [B N H K] the points, cell after cell
    bounds,  # [B H cells + 1] where each cell starts in `order`
    corner_weight,  # [B, N, H, K, 4] with which a point counts in the gradient of its corners
    levels, positions, queries, heads, points, cells, stride_gb, stride_gn,
    CHANNELS: tl.constexpr, LEVELS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_value_s = sum over points with corner s of corner_weight grad_output."""
    ACCUMULATE: tl.constexpr = corner_weight.dtype.element_ty
    program = tl.program_id(0)  # heads of a position, positions of a batch
    head = (program % heads).to(tl.int64)
    position = program // heads % positions
    batch = (program // heads // positions).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    grad_output += batch * stride_gb * ALIGN + head * CHANNELS
    first_cell = (batch * heads + head) * cells
    # [BLOCK_T, BLOCK_D]
    sums = tl.zeros([BLOCK_T, BLOCK_D], ACCUMULATE)
    for level in range(LEVELS):
        height, width, start, _ = level_at(levels, level, LEVELS)
        place = position - start
        if (place >= 0) & (place < height.to(tl.int64) * width):
            # of the cell above left this is corner 3, below right; of the one below right corner 0, above left
            cell = first_cell + place // width * (width + 1) + place % width
            for corner in range(4):
                of_corner = cell + (1 - corner // 2) * (width + 1) + (1 - corner % 2)
                begin, end = tl.load(bounds + of_corner), tl.load(bounds + of_corner + 1)
                for first in range(begin, end, BLOCK_T):
                    # [BLOCK_T]
                    run = first + tl.arange(0, BLOCK_T)
                    in_run = run < end
                    point = tl.load(order + run, in_run, other=0)
                    share = tl.load(corner_weight + 4 * point + corner, in_run, other=0)
                    query = point // points // heads % queries
                    mask = (in_run & (share != 0))[:, None] & (channels < CHANNELS)[None, :]
                    rows = query * stride_gn * ALIGN
                    # [BLOCK_T, BLOCK_D]
                    grad = tl.load(grad_output + rows[:, None] + channels[None, :], mask, other=0).to(ACCUMULATE)
                    sums += share[:, None] * grad
        first_cell += (height + 1).to(tl.int64) * (width + 1)
    row = (batch * positions + position) * heads + head
    tl.store(grad_value + row * CHANNELS + channels, tl.sum(sums, axis=0), channels < CHANNELS)
