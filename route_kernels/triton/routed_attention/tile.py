"""One tile of pairs (i, j) of routed attention: what is added to its logits, and the adjoint of that.

    p = sigmoid(gate_q . gate_k)   r = p (sup_q . sup_k) + (1 - p)(del_q . del_k)   b = strength clamp(r, -limit, limit)

Logits are kept times UNITS: log2(e) for short dtypes, so that exp is one exp2 instruction, and 1 for float32, where the
rounding of that product would show. A tile has queries for rows and keys for columns, or the other way round: the
formulas are symmetric, and the callers say which is which by strides.
"""

# ruff: noqa: RUF005 (a Triton kernel joins tuples with +)
from __future__ import annotations

import triton
import triton.language as tl

from ..language import INTERPRETED, dot, rounded

NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2

LOG2_E = 1.4426950408889634
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of float32
HALF_OF_TOO_LARGE: tl.constexpr = tl.constexpr(2.0**127)
# Where a mask leaves a row's lse below this, lse = max + log(sum) loses the sum: at -1e9 a float has steps of 64.
FAR_BELOW: tl.constexpr = tl.constexpr(-4096.0)


@triton.jit
def load_rows(pointer, stride_row, rows, count, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a matrix whose last dimension is contiguous, zeros beyond its end: [BLOCK, BLOCK_WIDTH]."""
    columns = tl.arange(0, BLOCK_WIDTH)
    # [BLOCK, BLOCK_WIDTH]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    inside = (rows < count)[:, None]
    if WIDTH != BLOCK_WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_head(pointer, strides, b, h, rows, count, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """`load_rows` of a head of an image; strides: of B, H and the rows."""
    return load_rows(pointer + b * strides[0] + h * strides[1], strides[2], rows, count, WIDTH, BLOCK_WIDTH)


@triton.jit
def store_rows(pointer, stride_row, rows, count, block, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The counterpart of `load_rows`, in the dtype of the pointer."""
    columns = tl.arange(0, BLOCK_WIDTH)
    # [BLOCK, BLOCK_WIDTH]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, rounded(block, pointer.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """FAST: 0.5 + 0.5 tanh(x / 2) by one special-function instruction, to 2^-12 absolute."""
    if FAST and not INTERPRETED:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        p = 0.5 + 0.5 * tanh
    else:
        p = tl.sigmoid(x)
    return p


@triton.jit
def products(rows, columns, PRECISION: tl.constexpr):
    """Inner products of rows [ROWS, WIDTH] and columns [COLUMNS, WIDTH]: [ROWS, COLUMNS] float32."""
    return dot(rows, tl.trans(columns), tl.zeros([rows.shape[0], columns.shape[0]], tl.float32), PRECISION)


@triton.jit
def load_gate(pointer, stride_row, rows, count, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a gate's factor, [BLOCK, BLOCK_RANK], or where COLUMNS is G a tuple of its G columns [BLOCK]."""
    if COLUMNS == 0:
        gate = load_rows(pointer, stride_row, rows, count, RANK, BLOCK_RANK)
    else:
        gate = ()
        for g in tl.static_range(COLUMNS):
            # [BLOCK]
            gate = gate + (tl.load(pointer + rows.to(tl.int64) * stride_row + g, mask=rows < count, other=0.0),)
    return gate


@triton.jit
def load_factors(
    factors, strides, b, rows, count,
    RANKS: tl.constexpr, PADDED_RANKS: tl.constexpr, GATE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """(sup, del, gate) of a block of rows; factors: pointers to the three, strides: of each, of an image and a row."""
    return (
        load_rows(factors[0] + b * strides[0], strides[1], rows, count, RANKS[0], PADDED_RANKS[0]),
        load_rows(factors[1] + b * strides[2], strides[3], rows, count, RANKS[1], PADDED_RANKS[1]),
        load_gate(factors[2] + b * strides[4], strides[5], rows, count, RANKS[2], PADDED_RANKS[2], GATE_COLUMNS),
    )


@triton.jit
def gate_zeros(ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros that the gradient of a gate's factor starts from, in the form of `load_gate`."""
    if COLUMNS == 0:
        zeros = tl.zeros([ROWS, BLOCK_RANK], tl.float32)
    else:
        zeros = ()
        for _ in tl.static_range(COLUMNS):
            zeros = zeros + (tl.zeros([ROWS], tl.float32),)
    return zeros


@triton.jit
def store_gate(pointer, rows, count, gate, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """The counterpart of `load_gate`, to contiguous rows."""
    if COLUMNS == 0:
        store_rows(pointer, RANK, rows, count, gate, RANK, BLOCK_RANK)
    else:
        for g in tl.static_range(COLUMNS):
            column = rounded(gate[g], pointer.dtype.element_ty)
            tl.store(pointer + rows.to(tl.int64) * RANK + g, column, mask=rows < count)


@triton.jit
def factor_zeros(ROWS: tl.constexpr, PADDED_RANKS: tl.constexpr, GATE_COLUMNS: tl.constexpr):
    """Zeros that the gradients of (sup, del, gate) start from."""
    return (
        tl.full([ROWS, PADDED_RANKS[0]], 0, tl.float32),
        tl.full([ROWS, PADDED_RANKS[1]], 0, tl.float32),
        gate_zeros(ROWS, PADDED_RANKS[2], GATE_COLUMNS),
    )


@triton.jit
def store_factors(
    pointers, first_row, rows, count, gradients,
    RANKS: tl.constexpr, PADDED_RANKS: tl.constexpr, GATE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of (sup, del, gate), to contiguous rows from `first_row` on."""
    store_rows(pointers[0] + first_row * RANKS[0], RANKS[0], rows, count, gradients[0], RANKS[0], PADDED_RANKS[0])
    store_rows(pointers[1] + first_row * RANKS[1], RANKS[1], rows, count, gradients[1], RANKS[1], PADDED_RANKS[1])
    store_gate(pointers[2] + first_row * RANKS[2], rows, count, gradients[2], RANKS[2], PADDED_RANKS[2], GATE_COLUMNS)


@triton.jit
def strength_and_limit(controls, strength, limit):
    """controls: pointer to both where they are a tensor, else None; a strength of None is 1."""
    if controls is not None:
        strength, limit = tl.load(controls), tl.load(controls + 1)
    return strength, limit


@triton.jit
def routing_bias(
    row_factors, column_factors, strength, limit,
    GATE_COLUMNS: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr, FAST_SIGMOID: tl.constexpr,
):  # fmt: skip
    """UNITS b of a tile, and its route: p (-1 where clamped), sup - del, clamp(r). Factors are (sup, del, gate)."""
    # [ROWS, COLUMNS]
    if GATE_COLUMNS == 0:
        gate = products(row_factors[2], column_factors[2], PRECISION)
    else:
        gate = row_factors[2][0].to(tl.float32)[:, None] * column_factors[2][0].to(tl.float32)[None, :]
        for g in tl.static_range(1, GATE_COLUMNS):
            gate += row_factors[2][g].to(tl.float32)[:, None] * column_factors[2][g].to(tl.float32)[None, :]
    p = sigmoid(gate, FAST_SIGMOID)
    suppressor = products(row_factors[0], column_factors[0], PRECISION)
    delegator = products(row_factors[1], column_factors[1], PRECISION)
    route = p * suppressor + (delegator - p * delegator)
    # A NaN stays one.
    clamped = tl.clamp(route, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    bias = clamped
    if strength is not None:
        bias = clamped * strength
    open_p = tl.where(tl.abs(route) <= limit, p, -1.0)
    return bias * UNITS, (open_p, suppressor - delegator, clamped)


@triton.jit
def route_adjoint(grad_bias, strength, route):
    """dsup = dr p,  ddel = dr (1 - p),  dgate = dr p (1 - p)(sup - del),  dr = strength db, 0 where the clamp bites."""
    # [ROWS, COLUMNS]
    open_p, difference = route[0], route[1]
    grad_route = tl.where(open_p >= 0.0, grad_bias, 0.0)
    if strength is not None:
        grad_route *= strength
    to_suppressor = grad_route * open_p
    to_delegator = grad_route - to_suppressor
    return to_suppressor, to_delegator, to_delegator * open_p * difference


@triton.jit
def add_product(gradient, tile, columns, PRECISION: tl.constexpr):
    """gradient + tile @ columns: [ROWS, R] + [ROWS, COLUMNS] @ [COLUMNS, R]."""
    return dot(rounded(tile, columns.dtype), columns, gradient, PRECISION)


@triton.jit
def add_factor_gradients(gradients, tiles, column_factors, GATE_COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of the rows' (sup, del, gate) with a tile's share added: += dproducts @ columns."""
    suppressor = add_product(gradients[0], tiles[0], column_factors[0], PRECISION)
    delegator = add_product(gradients[1], tiles[1], column_factors[1], PRECISION)
    if GATE_COLUMNS == 0:
        gate = add_product(gradients[2], tiles[2], column_factors[2], PRECISION)
    else:
        gate = ()
        for g in tl.static_range(GATE_COLUMNS):
            # [ROWS]
            column = column_factors[2][g].to(tl.float32)
            gate = gate + (gradients[2][g] + tl.sum(tiles[2] * column[None, :], axis=1),)
    return suppressor, delegator, gate


@triton.jit
def load_ranges(key_ranges, rows, count):
    """start0, end0, start1, end1 of queries, each [BLOCK] int32; rows beyond the last query read it again."""
    # [BLOCK]
    pointers = key_ranges + tl.minimum(rows, count - 1).to(tl.int64) * 4
    return tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3)


@triton.jit
def hull(starts, ends, keys):
    """[first, last) around the intervals [start, end) that are not empty within [0, keys); (keys, 0) if all are."""
    first, last = tl.maximum(starts, 0), tl.minimum(ends, keys)
    seen = first < last
    return tl.min(tl.where(seen, first, keys), axis=0), tl.max(tl.where(seen, last, 0), axis=0)


@triton.jit
def in_ranges(start0, end0, start1, end1, j):
    """Whether key j lies in one of a query's two intervals; the arguments broadcast to a tile.

    start <= j < end is one comparison of unsigned numbers: j - start < max(end - start, 0).
    """
    length0 = tl.where(start0 < end0, end0 - start0, 0).to(tl.uint32, bitcast=True)
    length1 = tl.where(start1 < end1, end1 - start1, 0).to(tl.uint32, bitcast=True)
    in_first = (j - start0).to(tl.uint32, bitcast=True) < length0
    return in_first | ((j - start1).to(tl.uint32, bitcast=True) < length1)


@triton.jit
def mask_pointers_of(attn_mask, rows, row_count, stride_row, columns, column_count, stride_column):
    """[ROWS, COLUMNS] within the mask: rows and columns beyond its end read the last one, and count nowhere."""
    rows = tl.minimum(rows, row_count - 1).to(tl.int64)
    columns = tl.minimum(columns, column_count - 1).to(tl.int64)
    # [ROWS, COLUMNS]
    return attn_mask + rows[:, None] * stride_row + columns[None, :] * stride_column


@triton.jit
def add_mask(bias, pointers, UNITS: tl.constexpr, MASK: tl.constexpr):
    """The bias of a tile with attn_mask applied: bool hides a pair, float is added to its logit.

    A finite mask stays finite: where UNITS times it would be -inf, a line of half the slope goes on.
    """
    # [ROWS, COLUMNS]
    if MASK == 1:
        hidden = tl.load(pointers) == 0
        masked = tl.where(hidden, float("-inf"), bias)
    else:
        mask = tl.load(pointers)
        if mask.dtype == tl.float64:
            finite = tl.maximum(mask, LOWEST, propagate_nan=tl.PropagateNan.ALL)
            mask = tl.where(mask == float("-inf"), mask, finite)
        mask = mask.to(tl.float32)
        if UNITS != 1.0:
            beyond = 0.5 * mask - (UNITS - 0.5) * HALF_OF_TOO_LARGE
            mask = tl.where(mask > -HALF_OF_TOO_LARGE, mask * UNITS, beyond)
        masked = bias + mask
    return masked


@triton.jit
def exponential(logits, UNITS: tl.constexpr):
    """exp of logits that are kept times UNITS."""
    return tl.exp(logits) if UNITS == 1.0 else tl.exp2(logits)


@triton.jit
def logits_of(inner_products, scale, bias, HIDDEN: tl.constexpr):
    """S = scale q . k + b + mask, all times UNITS. HIDDEN: what a mask hides is hidden whatever the key holds."""
    # [ROWS, COLUMNS]
    logits = inner_products * scale + bias
    if HIDDEN:
        logits = tl.where(bias == float("-inf"), bias, logits)
    return logits


@triton.jit
def tile_bias(
    b, rows, row_count, columns, column_count,
    row_factors,  # of `load_factors`
    factors, factor_strides,  # those of the columns, for `load_factors`
    strength, limit,
    ranges,  # start0, end0, start1, end1 of the rows; where keys are rows the pointer to the image's ranges
    attn_mask, mask_strides,
    QUERIES_ARE_ROWS: tl.constexpr, ROUTED: tl.constexpr, MASK: tl.constexpr, MASK_OF_HEAD: tl.constexpr,
    RANGES: tl.constexpr, RANKS: tl.constexpr, PADDED_RANKS: tl.constexpr, GATE_COLUMNS: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr, FAST_SIGMOID: tl.constexpr,
):  # fmt: skip
    """The summand of a tile's logits, for all heads: UNITS b, -inf where ranges or a mask of all heads hide.

    Also the columns' factors and the tile's route, for backward, and the pointers to a mask.
    Columns of queries beyond the last are not hidden here: their lse is +inf.
    """
    # [ROWS, COLUMNS]
    bias = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    column_factors, route, mask_pointers = (), (), ()
    if ROUTED:
        column_factors = load_factors(
            factors, factor_strides, b, columns, column_count, RANKS, PADDED_RANKS, GATE_COLUMNS
        )
        bias, route = routing_bias(
            row_factors, column_factors, strength, limit, GATE_COLUMNS, UNITS, PRECISION, FAST_SIGMOID
        )
    if QUERIES_ARE_ROWS:
        visible = (columns < column_count)[None, :]
        if RANGES:
            j = columns[None, :]
            visible = visible & in_ranges(
                ranges[0][:, None], ranges[1][:, None], ranges[2][:, None], ranges[3][:, None], j
            )
        bias = tl.where(visible, bias, float("-inf"))
    elif RANGES:
        start0, end0, start1, end1 = load_ranges(ranges, columns, column_count)
        j = rows[:, None]
        visible = in_ranges(start0[None, :], end0[None, :], start1[None, :], end1[None, :], j)
        bias = tl.where(visible, bias, float("-inf"))
    if MASK:
        row_stride, column_stride = mask_strides[2], mask_strides[3]
        if not QUERIES_ARE_ROWS:
            row_stride, column_stride = mask_strides[3], mask_strides[2]
        mask_pointers = mask_pointers_of(
            attn_mask + b * mask_strides[0], rows, row_count, row_stride, columns, column_count, column_stride
        )
        if not MASK_OF_HEAD:
            bias = add_mask(bias, mask_pointers, UNITS, MASK)
    return bias, column_factors, route, mask_pointers
