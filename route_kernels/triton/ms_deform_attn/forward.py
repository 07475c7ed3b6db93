"""The forward kernel of deformable attention, plain and fused: a program is a block of queries of one head.

Per point and query it reads four rows of D channels and does 8 D FLOP: it is bound by gathering value. Each thread
reads 16 bytes of a row, and the points of a level are unrolled, so that the rows of UNROLL points are in flight.
"""

import triton
import triton.language as tl

from ..launch import Kernel
from .tile import (
    corner_weights,
    corners_of,
    frame_of,
    level_at,
    located,
    program_block,
    rows_at,
    softmax_of,
    weight_at,
)

UNSPECIALIZED = (
    "queries", "heads", "points", "stride_vb", "stride_vs", "stride_vh", "stride_pb", "stride_pn", "stride_ph",
    "stride_wb", "stride_wn", "stride_wh", "stride_rb", "stride_rn", "stride_rl", "stride_mb", "stride_ms",
)  # fmt: skip


@triton.jit
def add_corner(sampled, value, offset, exists, weight, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """sampled + weight corner. A corner that does not exist is neither read nor multiplied by a NaN."""
    addresses, mask = rows_at(value, offset, exists, CHANNELS, BLOCK_D)
    # [BLOCK_N, BLOCK_D]
    corner = tl.load(addresses, mask, other=0).to(sampled.dtype)
    return sampled + tl.where(exists, weight, 0.0)[:, None] * corner


@Kernel
@triton.jit(do_not_specialize=UNSPECIALIZED)
def ms_deform_attn_forward(
    output,  # [B, N, H, D]
    value,  # [B, S, H, D]; ALIGN divides its strides, which are given as multiples of it
    point,  # [B, N, H, K, 2]: locations or offsets
    weight,  # [B, N, H, K]: weights or logits
    reference,  # [B, N, L or 1, COORDINATES], None for locations
    value_mask,  # [B, S] or None
    levels, queries, heads, points,
    stride_vb, stride_vs, stride_vh,
    stride_pb, stride_pn, stride_ph,
    stride_wb, stride_wn, stride_wh,
    stride_rb, stride_rn, stride_rl,
    stride_mb, stride_ms,
    CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ALL_POINTS: tl.constexpr,
    COORDINATES: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """output = sum over points of weight times the bilinear sample.

    POINTS is of each level, 0 where they differ; ALL_POINTS is K, 0 where it is large or there is no softmax.
    """
    ACCUMULATE: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    batch, head, rows = program_block(queries, heads, BLOCK_N)
    in_block = rows < queries
    stride_vs = stride_vs.to(tl.int64) * ALIGN
    value += (batch * stride_vb + head * stride_vh) * ALIGN
    point += batch * stride_pb + rows * stride_pn + head * stride_ph
    weight += batch * stride_wb + rows * stride_wn + head * stride_wh
    if value_mask is not None:
        value_mask += batch * stride_mb
    if COORDINATES > 0:
        reference += batch * stride_rb + rows * stride_rn
    shift, factor = softmax_of(weight, in_block, points, ACCUMULATE, COORDINATES, ALL_POINTS)
    # [BLOCK_N, BLOCK_D]
    sampled = tl.zeros([BLOCK_N, BLOCK_D], ACCUMULATE)
    first = 0
    for level in range(LEVELS):
        height, width, start, count = level_at(levels, level, LEVELS)
        if POINTS > 0:
            count = POINTS
        frame = frame_of(reference, level * tl.cast(stride_rl, tl.int64), in_block, count, ACCUMULATE, COORDINATES)
        for k in tl.range(first, first + count, loop_unroll_factor=UNROLL):
            # [BLOCK_N]
            _, _, inside, row, column, fraction_x, fraction_y = located(
                point + 2 * k, in_block, frame, height, width, ACCUMULATE, COORDINATES
            )
            share = weight_at(weight + k, in_block, shift, factor, ACCUMULATE, COORDINATES)
            position, has00, has01, has10, has11 = corners_of(
                inside, row, column, start, height, width, value_mask, stride_ms
            )
            w00, w01, w10, w11 = corner_weights(fraction_x, fraction_y)
            above = position * stride_vs
            below = above + width.to(tl.int64) * stride_vs
            sampled = add_corner(sampled, value, above, has00, share * w00, CHANNELS, BLOCK_D)
            sampled = add_corner(sampled, value, above + stride_vs, has01, share * w01, CHANNELS, BLOCK_D)
            sampled = add_corner(sampled, value, below, has10, share * w10, CHANNELS, BLOCK_D)
            sampled = add_corner(sampled, value, below + stride_vs, has11, share * w11, CHANNELS, BLOCK_D)
        first += count
    addresses, mask = rows_at(output, ((batch * queries + rows) * heads + head) * CHANNELS, in_block, CHANNELS, BLOCK_D)
    tl.store(addresses, sampled, mask)
