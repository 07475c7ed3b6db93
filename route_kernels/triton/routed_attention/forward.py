"""Forward kernel of routed attention: an online softmax over tiles of keys, for a group of heads at once.

A program owns BLOCK_N queries of HEADS_PER_PROGRAM heads. For each tile of BLOCK_M keys it computes the bias once and
uses it for every head: the bias costs one tanh and two products of rank R a pair, a head one exp2 and two of rank D.

With STATISTICS it computes rows again for backward: maximum and 1 / sum apart, where lse could not carry both.
"""

# ruff: noqa: RUF005 (a Triton kernel joins tuples with +)
from __future__ import annotations

import triton
import triton.language as tl

from ..language import dot, rounded
from ..launch import Kernel
from .tile import (
    FAR_BELOW,
    add_mask,
    exponential,
    hull,
    load_factors,
    load_head,
    load_ranges,
    load_rows,
    logits_of,
    products,
    store_rows,
    strength_and_limit,
    tile_bias,
)


@triton.jit
def tiles_seen(ranges, keys, BLOCK_M: tl.constexpr):
    """The tiles of keys that some query of a block sees: [first, first + count), then from `second` on; and in all.

    Two intervals a query make two hulls a block; tiles of the second that the first holds are not visited twice.
    """
    first0, last0 = hull(ranges[0], ranges[1], keys)
    first1, last1 = hull(ranges[2], ranges[3], keys)
    swap = first1 < first0
    low_first, low_last = tl.where(swap, first1, first0), tl.where(swap, last1, last0)
    high_first, high_last = tl.where(swap, first0, first1), tl.where(swap, last0, last1)
    first = low_first // BLOCK_M
    count = tl.maximum(tl.cdiv(low_last, BLOCK_M) - first, 0)
    second = tl.maximum(high_first // BLOCK_M, first + count)
    return first, count, second, count + tl.maximum(tl.cdiv(high_last, BLOCK_M) - second, 0)


@Kernel
@triton.jit(do_not_specialize=("heads", "queries", "keys"))
def attention_forward(
    query, key, value,  # [B, H, N, D], [B, H, M, D], [B, H, M, D]
    sup_q, sup_k, del_q, del_k, gate_q, gate_k,  # [B, N, R], [B, M, R], ..., [B, M, G]
    controls,  # [2] float32: strength, limit; or None
    attn_mask,  # [B, H, N, M] by strides: uint8 (0 hides) or floating (added)
    key_ranges,  # [B, N, 2, 2] int32, contiguous but for B
    output,  # [B, H, N, D], contiguous
    lse,  # [B, H, N] float32, contiguous
    statistics,  # [B, H, N, 2] float32, contiguous: max, times UNITS, and 1 / sum; with STATISTICS, instead of both
    scale, strength, limit,  # a strength of None is 1
    heads, queries, keys,
    stride_q, stride_k, stride_v,  # of B, H and N or M
    stride_factors_q, stride_factors_k,  # of B and N or M of sup, of del, of gate
    stride_mask,  # of B, H, N, M
    stride_ranges_b,
    ROUTED: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float
    MASK_OF_HEAD: tl.constexpr,  # the mask differs from head to head
    RANGES: tl.constexpr,
    D: tl.constexpr, RANKS: tl.constexpr,  # of sup, del, gate
    BLOCK_D: tl.constexpr, PADDED_RANKS: tl.constexpr,
    GATE_COLUMNS: tl.constexpr,  # G: the gate in multiply-adds; 0: by `dot`
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    PRECISION: tl.constexpr, FACTOR_PRECISION: tl.constexpr, FAST_SIGMOID: tl.constexpr,
    UNITS: tl.constexpr,  # of the logits within the kernel: see tile.py
    STATISTICS: tl.constexpr,
):  # fmt: skip
    blocks, groups = tl.cdiv(queries, BLOCK_N), tl.cdiv(heads, HEADS_PER_PROGRAM)
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks % groups
    b = (tl.program_id(0) // blocks // groups).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_of_logits = scale * UNITS
    strength, limit = strength_and_limit(controls, strength, limit)

    row_factors = ()
    if ROUTED:
        row_factors = load_factors(
            (sup_q, del_q, gate_q), stride_factors_q, b, rows, queries, RANKS, PADDED_RANKS, GATE_COLUMNS
        )
    query_rows, row_max, row_sum, attended = (), (), (), ()
    for i in tl.static_range(HEADS_PER_PROGRAM):
        h = tl.minimum(group * HEADS_PER_PROGRAM + i, heads - 1).to(tl.int64)
        query_rows = query_rows + (load_head(query, stride_q, b, h, rows, queries, D, BLOCK_D),)
        row_max = row_max + (tl.full([BLOCK_N], float("-inf"), tl.float32),)
        row_sum = row_sum + (tl.zeros([BLOCK_N], tl.float32),)
        attended = attended + (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)

    ranges = ()
    if RANGES:
        ranges = load_ranges(key_ranges + b * stride_ranges_b, rows, queries)
        first, count, second, tiles = tiles_seen(ranges, keys, BLOCK_M)
    else:
        tiles = tl.cdiv(keys, BLOCK_M)
    if STATISTICS:
        far_rows = 0
        for i in tl.static_range(HEADS_PER_PROGRAM):
            h = tl.minimum(group * HEADS_PER_PROGRAM + i, heads - 1).to(tl.int64)
            natural = tl.load(lse + (b * heads + h) * queries + rows, mask=rows < queries, other=0.0)
            far_rows += tl.sum((natural < FAR_BELOW).to(tl.int32), axis=0)
        tiles = tl.where(far_rows > 0, tiles, 0)

    for step in range(0, tiles):
        tile = step
        if RANGES:
            tile = tl.where(step < count, first + step, second + step - count)
        columns = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        # [BLOCK_N, BLOCK_M]
        bias, _, _, mask_pointers = tile_bias(
            b, rows, queries, columns, keys, row_factors, (sup_k, del_k, gate_k), stride_factors_k, strength, limit,
            ranges, attn_mask, stride_mask, True, ROUTED, MASK, MASK_OF_HEAD, RANGES, RANKS, PADDED_RANKS,
            GATE_COLUMNS, UNITS, FACTOR_PRECISION, FAST_SIGMOID,
        )  # fmt: skip

        new_max, new_sum, new_attended = (), (), ()
        for i in tl.static_range(HEADS_PER_PROGRAM):
            h = tl.minimum(group * HEADS_PER_PROGRAM + i, heads - 1).to(tl.int64)
            key_rows = load_head(key, stride_k, b, h, columns, keys, D, BLOCK_D)
            if not STATISTICS:
                value_rows = load_rows(
                    value + b * stride_v[0] + h * stride_v[1], stride_v[2], columns, keys, D, BLOCK_D
                )
            bias_of_head = bias
            if MASK_OF_HEAD:
                bias_of_head = add_mask(bias, mask_pointers + h * stride_mask[1], UNITS, MASK)
            # [BLOCK_N, BLOCK_M]
            inner = products(query_rows[i], key_rows, PRECISION)
            logits = logits_of(inner, scale_of_logits, bias_of_head, MASK != 0 or RANGES)
            largest = tl.maximum(row_max[i], tl.max(logits, axis=1))
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            weights = exponential(logits - shift[:, None], UNITS)
            correction = exponential(row_max[i] - shift, UNITS)
            if STATISTICS:
                corrected = attended[i]
            else:
                # [BLOCK_N, BLOCK_D]
                corrected = attended[i] * correction[:, None]
                corrected = dot(rounded(weights, value_rows.dtype), value_rows, corrected, PRECISION)
            new_max = new_max + (largest,)
            new_sum = new_sum + (row_sum[i] * correction + tl.sum(weights, axis=1),)
            new_attended = new_attended + (corrected,)
        row_max, row_sum, attended = new_max, new_sum, new_attended

    for i in tl.static_range(HEADS_PER_PROGRAM):
        h = group * HEADS_PER_PROGRAM + i
        count_of_head = tl.where(h < heads, queries, 0)
        row_of_head = (b * heads + h) * queries
        total = row_sum[i]
        if STATISTICS:
            natural = tl.load(lse + row_of_head + rows, mask=rows < count_of_head, other=0.0)
            far = natural < FAR_BELOW
            pairs = statistics + (row_of_head + rows) * 2
            tl.store(pairs, tl.where(far, row_max[i], natural * UNITS), mask=rows < count_of_head)
            tl.store(pairs + 1, tl.where(far, 1.0 / total, 1.0), mask=rows < count_of_head)
        else:
            # A query that attended nothing gives 0, and lse = +inf makes exp(S - lse) 0 in backward.
            average = attended[i] * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
            natural = tl.where(row_max[i] > float("-inf"), row_max[i] / UNITS + tl.log(total), float("inf"))
            store_rows(output + row_of_head * D, D, rows, count_of_head, average, D, BLOCK_D)
            tl.store(lse + row_of_head + rows, natural, mask=rows < count_of_head)
