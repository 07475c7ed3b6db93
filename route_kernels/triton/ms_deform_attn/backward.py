"""The backward kernels of deformable attention, plain and fused: a program is a block of queries of one head.

Per point and query the first loop over a level's points reads four rows of D channels for the gradients of weight and
point, without atomics; the second adds to four rows of the gradient of value, 16 bytes a reduction where the target has
such. They are apart so that the reads of UNROLL points are in flight, none behind a reduction.
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
    pixel_adjoint,
    program_block,
    rows_at,
    sample_adjoint,
    softmax_of,
    weight_at,
)

UNSPECIALIZED = (
    "queries", "positions", "heads", "points", "cells", "stride_gb", "stride_gn", "stride_vb", "stride_vs", "stride_vh",
    "stride_pb", "stride_pn", "stride_ph", "stride_wb", "stride_wn", "stride_wh", "stride_rb", "stride_rn", "stride_rl",
    "stride_mb", "stride_ms",
)  # fmt: skip


@triton.jit
def dot_corner(grad, value, offset, exists, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """grad_output . corner; 0 where there is no corner, whatever the gradient holds."""
    addresses, mask = rows_at(value, offset, exists, CHANNELS, BLOCK_D)
    # [BLOCK_N, BLOCK_D]
    corner = tl.load(addresses, mask, other=0).to(grad.dtype)
    return tl.where(exists, tl.sum(grad * corner, axis=1), 0.0)


@triton.jit
def scatter_corner(grad_value, offset, exists, weight, grad, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """grad_value_corner += weight grad_output."""
    addresses, mask = rows_at(grad_value, offset, exists, CHANNELS, BLOCK_D)
    tl.atomic_add(addresses, weight[:, None] * grad, mask, sem="relaxed", scope="gpu")


@Kernel
@triton.jit(do_not_specialize=UNSPECIALIZED)
def ms_deform_attn_backward(
    grad_output,  # [B, N, H, D]; ALIGN divides its strides and those of value, which are given as multiples of it
    grad_value,  # [B, S, H, D] zeros in the dtype of the sums, or None: then what it is summed from, in a fixed order:
    cell,  # [B, N, H, K] the cell that a point falls into; each batch and head has `cells`, the last for nowhere
    corner_weight,  # [B, N, H, K, 4] with which it counts in the gradient of its corners
    grad_point,  # [B, N, H, K, 2]
    grad_weight,  # [B, N, H, K] of the weights themselves, in front of a softmax, too
    grad_reference,  # [B, N, H, L, COORDINATES] of one head, or None
    value,  # [B, S, H, D]
    point,  # [B, N, H, K, 2]: locations or offsets
    weight,  # [B, N, H, K]: weights or logits
    reference,  # [B, N, L or 1, COORDINATES], None for locations
    value_mask,  # [B, S] or None
    levels, queries, positions, heads, points, cells,
    stride_gb, stride_gn,
    stride_vb, stride_vs, stride_vh,
    stride_pb, stride_pn, stride_ph,
    stride_wb, stride_wn, stride_wh,
    stride_rb, stride_rn, stride_rl,
    stride_mb, stride_ms,
    CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ALL_POINTS: tl.constexpr,
    COORDINATES: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Every gradient but that of the softmax; POINTS and ALL_POINTS as in the forward kernel."""
    ACCUMULATE: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    batch, head, rows = program_block(queries, heads, BLOCK_N)
    in_block = rows < queries
    stride_vs = stride_vs.to(tl.int64) * ALIGN
    value += (batch * stride_vb + head * stride_vh) * ALIGN
    point += batch * stride_pb + rows * stride_pn + head * stride_ph
    weight += batch * stride_wb + rows * stride_wn + head * stride_wh
    row = (batch * queries + rows) * heads + head
    grad_point += row * points * 2
    grad_weight += row * points
    if value_mask is not None:
        value_mask += batch * stride_mb
    if grad_value is None:
        cell += row * points
        corner_weight += row * points * 4
    else:
        grad_value += (batch * positions * heads + head) * CHANNELS
    if grad_reference is not None:
        grad_reference += row * LEVELS * COORDINATES
    if COORDINATES > 0:
        reference += batch * stride_rb + rows * stride_rn
    shift, factor = softmax_of(weight, in_block, points, ACCUMULATE, COORDINATES, ALL_POINTS)
    addresses, mask = rows_at(
        grad_output + head * CHANNELS, (batch * stride_gb + rows * stride_gn) * ALIGN, in_block, CHANNELS, BLOCK_D
    )
    # [BLOCK_N, BLOCK_D]
    grad = tl.load(addresses, mask, other=0).to(ACCUMULATE)
    first_cell = (batch * heads + head) * cells
    nowhere = first_cell + (cells - 1)
    first = 0
    for level in range(LEVELS):
        height, width, start, count = level_at(levels, level, LEVELS)
        if POINTS > 0:
            count = POINTS
        frame = frame_of(reference, level * tl.cast(stride_rl, tl.int64), in_block, count, ACCUMULATE, COORDINATES)
        extent_x, extent_y, half_step = frame[2], frame[3], frame[4]
        # [BLOCK_N]
        sum_x = tl.zeros([BLOCK_N], ACCUMULATE)
        sum_y, sum_extent_x, sum_extent_y = sum_x, sum_x, sum_x
        for k in tl.range(first, first + count, loop_unroll_factor=UNROLL):
            point_x, point_y, inside, pixel_row, column, fraction_x, fraction_y = located(
                point + 2 * k, in_block, frame, height, width, ACCUMULATE, COORDINATES
            )
            share = weight_at(weight + k, in_block, shift, factor, ACCUMULATE, COORDINATES)
            position, has00, has01, has10, has11 = corners_of(
                inside, pixel_row, column, start, height, width, value_mask, stride_ms
            )
            above = position * stride_vs
            below = above + width.to(tl.int64) * stride_vs
            s00 = dot_corner(grad, value, above, has00, CHANNELS, BLOCK_D)
            s01 = dot_corner(grad, value, above + stride_vs, has01, CHANNELS, BLOCK_D)
            s10 = dot_corner(grad, value, below, has10, CHANNELS, BLOCK_D)
            s11 = dot_corner(grad, value, below + stride_vs, has11, CHANNELS, BLOCK_D)
            of_weight, of_x, of_y = sample_adjoint(s00, s01, s10, s11, fraction_x, fraction_y)
            of_x, of_y = share * of_x, share * of_y  # by the pixel; then by point, reference and extent
            of_x, of_center_x, of_extent_x = pixel_adjoint(of_x, point_x, extent_x, half_step, width, COORDINATES)
            of_y, of_center_y, of_extent_y = pixel_adjoint(of_y, point_y, extent_y, half_step, height, COORDINATES)
            tl.store(grad_weight + k, of_weight, in_block)
            tl.store(grad_point + 2 * k, tl.where(inside, of_x, 0.0), in_block)
            tl.store(grad_point + 2 * k + 1, tl.where(inside, of_y, 0.0), in_block)
            if grad_reference is not None:
                sum_x += tl.where(inside, of_center_x, 0.0)
                sum_y += tl.where(inside, of_center_y, 0.0)
                sum_extent_x += tl.where(inside, of_extent_x, 0.0)
                sum_extent_y += tl.where(inside, of_extent_y, 0.0)
        for k in tl.range(first, first + count, loop_unroll_factor=UNROLL):
            _, _, inside, pixel_row, column, fraction_x, fraction_y = located(
                point + 2 * k, in_block, frame, height, width, ACCUMULATE, COORDINATES
            )
            share = weight_at(weight + k, in_block, shift, factor, ACCUMULATE, COORDINATES)
            position, has00, has01, has10, has11 = corners_of(
                inside, pixel_row, column, start, height, width, value_mask, stride_ms
            )
            w00, w01, w10, w11 = corner_weights(fraction_x, fraction_y)
            if grad_value is None:
                own = first_cell + (pixel_row + 1).to(tl.int64) * (width + 1) + (column + 1)
                tl.store(cell + k, tl.where(inside, own, nowhere), in_block)
                tl.store(corner_weight + 4 * k, tl.where(has00, share * w00, 0.0), in_block)
                tl.store(corner_weight + 4 * k + 1, tl.where(has01, share * w01, 0.0), in_block)
                tl.store(corner_weight + 4 * k + 2, tl.where(has10, share * w10, 0.0), in_block)
                tl.store(corner_weight + 4 * k + 3, tl.where(has11, share * w11, 0.0), in_block)
            else:
                beside = heads * CHANNELS
                above = position * beside
                below = above + width.to(tl.int64) * beside
                scatter_corner(grad_value, above, has00, share * w00, grad, CHANNELS, BLOCK_D)
                scatter_corner(grad_value, above + beside, has01, share * w01, grad, CHANNELS, BLOCK_D)
                scatter_corner(grad_value, below, has10, share * w10, grad, CHANNELS, BLOCK_D)
                scatter_corner(grad_value, below + beside, has11, share * w11, grad, CHANNELS, BLOCK_D)
        if grad_reference is not None:
            of_level = grad_reference + level * COORDINATES
            tl.store(of_level, sum_x, in_block)
            tl.store(of_level + 1, sum_y, in_block)
            if COORDINATES == 4:
                tl.store(of_level + 2, sum_extent_x, in_block)
                tl.store(of_level + 3, sum_extent_y, in_block)
        first += count
        if grad_value is None:
            first_cell += (height + 1).to(tl.int64) * (width + 1)


@Kernel
@triton.jit(do_not_specialize=("positions", "queries", "heads", "points", "cells", "stride_gb", "stride_gn"))
def ms_deform_attn_gather(
    grad_value,  # [B, S, H, D]
    grad_output,  # [B, N, H, D]; ALIGN divides its strides, which are given as multiples of it
    order,  # [B N H K] the points, cell after cell
    bounds,  # [B H cells + 1] where each cell starts in `order`
    corner_weight,  # [B, N, H, K, 4] with which a point counts in the gradient of its corners
    levels, positions, queries, heads, points, cells, stride_gb, stride_gn,
    CHANNELS: tl.constexpr, LEVELS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_value_s = sum over points with corner s of corner_weight grad_output, in a fixed order.

    A program sums over the points around one position of one head. They come sorted by the cell they fall into; a
    position is a corner of four cells, so its sum has four runs of points, and nothing is added by two programs.
    """
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


@triton.jit
def softmax_statistics(logits, in_block, points, ACCUMULATE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Shift and factor with which exp(logit - shift) factor is the softmax; logits: pointers to the first of a row."""
    columns = tl.arange(0, BLOCK_K)
    # [BLOCK_N]
    largest = tl.full(logits.shape, float("-inf"), ACCUMULATE)
    total = tl.zeros(logits.shape, ACCUMULATE)
    for first in range(0, points, BLOCK_K):
        # [BLOCK_N, BLOCK_K]
        in_row = (first + columns < points)[None, :]
        block = tl.load(logits[:, None] + (first + columns)[None, :], in_block[:, None] & in_row, other=0)
        block = tl.where(in_row, block.to(ACCUMULATE), float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(block, axis=1))
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # exp(-inf - -inf) would be NaN
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(block - shift[:, None]), axis=1)
    return tl.where(largest == float("-inf"), 0.0, largest), 1.0 / tl.where(total < 1.0, 1.0, total)


@Kernel
@triton.jit(do_not_specialize=("rows", "queries", "heads", "points", "stride_wb", "stride_wn", "stride_wh"))
def softmax_adjoint(
    grad_logit,  # [B, N, H, K]
    grad_weight,  # [B, N, H, K]; may be grad_logit
    logit,  # [B, N, H, K]
    rows, queries, heads, points, stride_wb, stride_wn, stride_wh,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_logit = p (grad_weight - sum_j p_j grad_weight_j), p = softmax(logit)."""
    ACCUMULATE: tl.constexpr = grad_weight.dtype.element_ty
    # [BLOCK_N]
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_block = row < rows
    batch, query, head = row // heads // queries, row // heads % queries, row % heads
    logit += batch * stride_wb + query * stride_wn + head * stride_wh
    grad_weight += row * points
    grad_logit += row * points
    shift, factor = softmax_statistics(logit, in_block, points, ACCUMULATE, BLOCK_K)
    expected = tl.zeros([BLOCK_N], ACCUMULATE)
    for last in range(2):
        for first in range(0, points, BLOCK_K):
            # [BLOCK_N, BLOCK_K]
            columns = first + tl.arange(0, BLOCK_K)[None, :]
            mask = in_block[:, None] & (columns < points)
            p = tl.load(logit[:, None] + columns, mask, other=float("-inf")).to(ACCUMULATE)
            p = tl.exp(p - shift[:, None]) * factor[:, None]
            grad = tl.load(grad_weight[:, None] + columns, mask, other=0)
            if last == 0:
                expected += tl.sum(tl.where(mask, p * grad, 0.0), axis=1)
            else:
                tl.store(grad_logit[:, None] + columns, p * (grad - expected[:, None]), mask)
