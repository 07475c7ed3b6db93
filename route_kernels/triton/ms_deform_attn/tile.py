"""The formulas of deformable attention for one point of a block of queries, each forward beside its adjoint.

A level is `height` rows of `width` pixels; pixel coordinates have the centre of the first pixel at 0. COORDINATES says
what a point is: 0 a location, 2 an offset from a reference (x, y), 4 an offset from a reference (cx, cy, w, h).
"""

import triton
import triton.language as tl


@triton.jit
def program_block(queries, heads, BLOCK_N: tl.constexpr):
    """The batch and head of this program and its block of queries, as int64: addresses are products of them."""
    program, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_N)
    rows = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    batch_and_head = program // blocks
    return (batch_and_head // heads).to(tl.int64), (batch_and_head % heads).to(tl.int64), rows.to(tl.int64)


@triton.jit
def level_at(levels, level, LEVELS: tl.constexpr):
    """Height, width, start and points of a level, out of (height, width, start, points) of one after the other."""
    height, width, start, points = levels[0] >> 1, levels[1] >> 1, (levels[2] >> 1).to(tl.int64), levels[3] >> 1
    for other in tl.static_range(1, LEVELS):
        found = level == other
        height = tl.where(found, levels[4 * other] >> 1, height)
        width = tl.where(found, levels[4 * other + 1] >> 1, width)
        start = tl.where(found, (levels[4 * other + 2] >> 1).to(tl.int64), start)
        points = tl.where(found, levels[4 * other + 3] >> 1, points)
    return height - 1, width - 1, start - 1, points - 1


@triton.jit
def frame_of(reference, level, in_block, points, ACCUMULATE: tl.constexpr, COORDINATES: tl.constexpr):
    """x, y and the extents w, h of a level's reference points, and 0.5 / P.

    reference: pointers to x of level 0; level: how far this level is from there.
    """
    # [BLOCK_N]
    x, y, extent_x, extent_y = 0.0, 0.0, 0.0, 0.0
    if COORDINATES > 0:
        x = tl.load(reference + level, in_block, other=0).to(ACCUMULATE)
        y = tl.load(reference + level + 1, in_block, other=0).to(ACCUMULATE)
    if COORDINATES == 4:
        extent_x = tl.load(reference + level + 2, in_block, other=0).to(ACCUMULATE)
        extent_y = tl.load(reference + level + 3, in_block, other=0).to(ACCUMULATE)
    return x, y, extent_x, extent_y, 0.5 / tl.cast(tl.maximum(points, 1), ACCUMULATE)


@triton.jit
def pixel_of(point, reference, extent, half_step, size, COORDINATES: tl.constexpr):
    """location size - 0.5, where location = point, reference + point / size or reference + point half_step extent."""
    if COORDINATES == 0:
        return point * size - 0.5
    elif COORDINATES == 2:
        return reference * size + (point - 0.5)
    else:
        return (reference + point * half_step * extent) * size - 0.5


@triton.jit
def pixel_adjoint(grad_pixel, point, extent, half_step, size, COORDINATES: tl.constexpr):
    """The gradients of point, reference and extent."""
    grad_location = grad_pixel * size
    if COORDINATES == 0:
        return grad_location, grad_location, grad_location
    elif COORDINATES == 2:
        return grad_pixel, grad_location, grad_location
    else:
        return grad_location * half_step * extent, grad_location, grad_location * (point * half_step)


@triton.jit
def located(
    point, in_block, frame, height, width, ACCUMULATE: tl.constexpr, COORDINATES: tl.constexpr
):  # fmt: skip
    """x and y of a point, and the cell of four pixels that it falls into: inside, row, column, fraction_x, fraction_y.

    `inside` is false for what is NaN or a pixel or more outside, and beyond the last query: it has no corner. The test
    comes before any conversion to an integer. point: pointers to x; frame: of `frame_of`.
    """
    # [BLOCK_N]
    point_x = tl.load(point, in_block, other=float("nan")).to(ACCUMULATE)
    point_y = tl.load(point + 1, in_block, other=float("nan")).to(ACCUMULATE)
    x = pixel_of(point_x, frame[0], frame[2], frame[4], width, COORDINATES)
    y = pixel_of(point_y, frame[1], frame[3], frame[4], height, COORDINATES)
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    left, above = tl.floor(x), tl.floor(y)
    return point_x, point_y, inside, above.to(tl.int32), left.to(tl.int32), x - left, y - above


@triton.jit
def corners_of(inside, row, column, start, height, width, mask, stride_mask):
    """The position of the corner above left, and which of the four (row by row) exist and count.

    mask: pointer to the bool [S] of the batch, True where a position counts as zero; None without.
    """
    position = start + row.to(tl.int64) * width + column
    top, bottom = inside & (row >= 0), inside & (row < height - 1)
    left, right = column >= 0, column < width - 1
    has00, has01, has10, has11 = top & left, top & right, bottom & left, bottom & right
    if mask is not None:
        has00 = has00 & (tl.load(mask + position * stride_mask, has00, other=1) == 0)
        has01 = has01 & (tl.load(mask + (position + 1) * stride_mask, has01, other=1) == 0)
        has10 = has10 & (tl.load(mask + (position + width) * stride_mask, has10, other=1) == 0)
        has11 = has11 & (tl.load(mask + (position + width + 1) * stride_mask, has11, other=1) == 0)
    return position, has00, has01, has10, has11


@triton.jit
def rows_at(pointers, offsets, exists, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses and mask of rows of channels; pointers: to the row at offset 0."""
    channels = tl.arange(0, BLOCK_D)
    # [BLOCK_N, BLOCK_D]
    addresses = pointers + (offsets[:, None] + channels[None, :])
    mask = exists[:, None]
    if BLOCK_D != CHANNELS:
        mask = mask & (channels < CHANNELS)[None, :]
    return addresses, mask


@triton.jit
def corner_weights(fraction_x, fraction_y):
    """The weights of the bilinear sample's corners, row by row."""
    left, above = 1 - fraction_x, 1 - fraction_y
    return above * left, above * fraction_x, fraction_y * left, fraction_y * fraction_x


@triton.jit
def sample_adjoint(s00, s01, s10, s11, fraction_x, fraction_y):
    """s = grad_output . corner: the gradients of a sample by its weight and, before that weight, by its pixel x, y."""
    above, below = s00 + fraction_x * (s01 - s00), s10 + fraction_x * (s11 - s10)
    grad_x = (1 - fraction_y) * (s01 - s00) + fraction_y * (s11 - s10)
    return above + fraction_y * (below - above), grad_x, below - above


@triton.jit
def softmax_of(
    weight, in_block, points, ACCUMULATE: tl.constexpr, COORDINATES: tl.constexpr, ALL_POINTS: tl.constexpr
):  # fmt: skip
    """Shift and factor with which exp(logit - shift) factor is the softmax; weight: pointers to the first of K logits.

    Where every logit is -inf, so that their sum is below 1, every weight is 0.

    Where K is known (ALL_POINTS) there is no loop: its result would bind every tensor of a query to another layout than
    that of the rows of channels, and the compiler would compute the locations in both.
    """
    shift, factor = 0.0, 1.0
    if COORDINATES > 0:
        # [BLOCK_N]
        largest = tl.full(weight.shape, float("-inf"), ACCUMULATE)
        total = tl.zeros(weight.shape, ACCUMULATE)
        if ALL_POINTS > 0:
            for k in tl.static_range(ALL_POINTS):
                largest = tl.maximum(largest, tl.load(weight + k, in_block, other=0).to(ACCUMULATE))
        else:
            for k in range(points):
                largest = tl.maximum(largest, tl.load(weight + k, in_block, other=0).to(ACCUMULATE))
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # exp(-inf - -inf) would be NaN
        if ALL_POINTS > 0:
            for k in tl.static_range(ALL_POINTS):
                total += tl.exp(tl.load(weight + k, in_block, other=0).to(ACCUMULATE) - shift)
        else:
            for k in range(points):
                total += tl.exp(tl.load(weight + k, in_block, other=0).to(ACCUMULATE) - shift)
        factor = 1.0 / tl.where(total < 1.0, 1.0, total)
    return shift, factor


@triton.jit
def weight_at(weights, in_block, shift, factor, ACCUMULATE: tl.constexpr, COORDINATES: tl.constexpr):
    """The weight of a point, out of its logit where there are reference points. weights: pointers to it."""
    # [BLOCK_N]
    weight = tl.load(weights, in_block, other=0).to(ACCUMULATE)
    if COORDINATES > 0:
        weight = tl.exp(weight - shift) * factor
    return weight
