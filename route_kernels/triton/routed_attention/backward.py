"""Backward kernels of routed attention: one pass over blocks of queries, one over blocks of keys, no atomics.

    P_hij = exp(S_hij - lse_hi)                        dS_hij = P_hij (dO_hi . v_hj - T_hi),  T_hi = dO_hi . O_hi
    queries: dQ = scale dS K                           keys: dK = scale dS^T Q,  dV = P^T dO
    both:    dr_ij = [ |r_ij| <= limit ] sum_h dS_hij, and from it the gradients of the pass's own three factors

Each sum has one owner and one order, so results repeat bit for bit. The price is that P and dS are computed twice:
7 products of rank D a pair and head where atomics would need 5. The bias and its adjoint are computed once for the
HEADS_PER_PROGRAM heads of a program; where that is not all heads, each group writes its share of the factors'
gradients, [groups, B, N, R], and `sum_groups` adds them in order.

Far below 0, where an additive mask of finfo.min leaves a row, lse = max + log(sum) has lost the sum: with such masks
the passes read maximum and 1 / sum apart, from `attention_forward` with STATISTICS.
"""

# ruff: noqa: RUF005 (a Triton kernel joins tuples with +)
from __future__ import annotations

import triton
import triton.language as tl

from ..language import dot, rounded
from ..launch import Kernel
from .forward import tiles_seen
from .tile import (
    add_factor_gradients,
    add_mask,
    exponential,
    factor_zeros,
    load_factors,
    load_head,
    load_ranges,
    load_rows,
    logits_of,
    products,
    route_adjoint,
    store_factors,
    store_rows,
    strength_and_limit,
    tile_bias,
)


@Kernel
@triton.jit(do_not_specialize=("heads", "queries", "keys"))
def attention_backward_queries(
    grad_output, output,  # [B, H, N, D]; output is contiguous
    lse,  # [B, H, N] float32, contiguous; with a float mask [B, H, N, 2]: max, times UNITS, and 1 / sum
    query, key, value,  # [B, H, N, D], [B, H, M, D], [B, H, M, D]
    sup_q, sup_k, del_q, del_k, gate_q, gate_k,  # [B, N, R], [B, M, R], ..., [B, M, G]
    controls,  # [2] float32: strength, limit; or None
    attn_mask,  # [B, H, N, M] by strides: uint8 (0 hides) or floating (added)
    key_ranges,  # [B, N, 2, 2] int32, contiguous but for B
    grad_query,  # [B, H, N, D], contiguous
    grad_sup, grad_del, grad_gate,  # [groups, B, N, R], [groups, B, N, R], [groups, B, N, G], contiguous
    output_dot,  # [B, H, N] float32: T, for the other pass
    grad_strength,  # [groups, B, N] float32, contiguous, or None: rows of sum_j sum_h dS_hij clamp(r_ij)
    scale, strength, limit,  # a strength of None is 1
    batch, heads, queries, keys,
    stride_o,  # of B, H and N of grad_output
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
):  # fmt: skip
    blocks, groups = tl.cdiv(queries, BLOCK_N), tl.cdiv(heads, HEADS_PER_PROGRAM)
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks % groups
    b = (tl.program_id(0) // blocks // groups).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_of_logits = scale * UNITS
    strength, limit = strength_and_limit(controls, strength, limit)

    row_factors, factor_gradients = (), ()
    if ROUTED:
        row_factors = load_factors(
            (sup_q, del_q, gate_q), stride_factors_q, b, rows, queries, RANKS, PADDED_RANKS, GATE_COLUMNS
        )
        factor_gradients = factor_zeros(BLOCK_N, PADDED_RANKS, GATE_COLUMNS)
        if grad_strength is not None:
            strength_rows = tl.zeros([BLOCK_N], tl.float32)
    query_rows, incoming_rows, lse_rows, inverse_sum_rows, dots, gradients = (), (), (), (), (), ()
    for i in tl.static_range(HEADS_PER_PROGRAM):
        # A head beyond the last repeats it with lse = +inf, so that its P and dS are 0.
        h = tl.minimum(group * HEADS_PER_PROGRAM + i, heads - 1).to(tl.int64)
        count_of_head = tl.where(group * HEADS_PER_PROGRAM + i < heads, queries, 0)
        row_of_head = (b * heads + h) * queries
        incoming = load_head(grad_output, stride_o, b, h, rows, queries, D, BLOCK_D)
        attended = load_rows(output + row_of_head * D, D, rows, queries, D, BLOCK_D)
        # [BLOCK_N]
        output_dot_row = tl.sum(incoming.to(tl.float32) * attended.to(tl.float32), axis=1)
        tl.store(output_dot + row_of_head + rows, output_dot_row, mask=rows < count_of_head)
        query_rows = query_rows + (load_head(query, stride_q, b, h, rows, queries, D, BLOCK_D),)
        incoming_rows = incoming_rows + (incoming,)
        if MASK == 2:
            pairs = lse + row_of_head * 2 + rows * 2
            lse_rows = lse_rows + (tl.load(pairs, mask=rows < count_of_head, other=float("inf")),)
            inverse_sum_rows = inverse_sum_rows + (tl.load(pairs + 1, mask=rows < count_of_head, other=0.0),)
        else:
            natural = tl.load(lse + row_of_head + rows, mask=rows < count_of_head, other=float("inf"))
            lse_rows = lse_rows + (natural * UNITS,)
        dots = dots + (output_dot_row,)
        gradients = gradients + (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)

    ranges = ()
    if RANGES:
        ranges = load_ranges(key_ranges + b * stride_ranges_b, rows, queries)
        first, count, second, tiles = tiles_seen(ranges, keys, BLOCK_M)
    else:
        tiles = tl.cdiv(keys, BLOCK_M)

    for step in range(0, tiles):
        tile = step
        if RANGES:
            tile = tl.where(step < count, first + step, second + step - count)
        columns = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        # [BLOCK_N, BLOCK_M]
        bias, column_factors, route, mask_pointers = tile_bias(
            b, rows, queries, columns, keys, row_factors, (sup_k, del_k, gate_k), stride_factors_k, strength, limit,
            ranges, attn_mask, stride_mask, True, ROUTED, MASK, MASK_OF_HEAD, RANGES, RANKS, PADDED_RANKS,
            GATE_COLUMNS, UNITS, FACTOR_PRECISION, FAST_SIGMOID,
        )  # fmt: skip

        grad_bias = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        added = ()
        for i in tl.static_range(HEADS_PER_PROGRAM):
            h = tl.minimum(group * HEADS_PER_PROGRAM + i, heads - 1).to(tl.int64)
            key_rows = load_head(key, stride_k, b, h, columns, keys, D, BLOCK_D)
            value_rows = load_head(value, stride_v, b, h, columns, keys, D, BLOCK_D)
            bias_of_head = bias
            if MASK_OF_HEAD:
                bias_of_head = add_mask(bias, mask_pointers + h * stride_mask[1], UNITS, MASK)
            # [BLOCK_N, BLOCK_M]
            inner = products(query_rows[i], key_rows, PRECISION)
            logits = logits_of(inner, scale_of_logits, bias_of_head, MASK != 0 or RANGES)
            weights = exponential(logits - lse_rows[i][:, None], UNITS)
            if MASK == 2:
                weights *= inverse_sum_rows[i][:, None]
            grad_weights = products(incoming_rows[i], value_rows, PRECISION)
            grad_logits = weights * (grad_weights - dots[i][:, None])
            if ROUTED:
                grad_bias += grad_logits
            # [BLOCK_N, BLOCK_D]
            added = added + (dot(rounded(grad_logits, key_rows.dtype), key_rows, gradients[i], PRECISION),)
        gradients = added
        if grad_strength is not None:
            strength_rows += tl.sum(grad_bias * route[2], axis=1)
        if ROUTED:
            to_factors = route_adjoint(grad_bias, strength, route)
            factor_gradients = add_factor_gradients(
                factor_gradients, to_factors, column_factors, GATE_COLUMNS, FACTOR_PRECISION
            )

    for i in tl.static_range(HEADS_PER_PROGRAM):
        h = group * HEADS_PER_PROGRAM + i
        count_of_head = tl.where(h < heads, queries, 0)
        row_of_head = (b * heads + h) * queries
        store_rows(grad_query + row_of_head * D, D, rows, count_of_head, gradients[i] * scale, D, BLOCK_D)
    if ROUTED:
        first_row = (group.to(tl.int64) * batch + b) * queries
        if grad_strength is not None:
            tl.store(grad_strength + first_row + rows, strength_rows, mask=rows < queries)
        pointers = (grad_sup, grad_del, grad_gate)
        store_factors(pointers, first_row, rows, queries, factor_gradients, RANKS, PADDED_RANKS, GATE_COLUMNS)


@triton.jit
def queries_seeing(key_ranges, first_key, end_key, queries, BLOCK: tl.constexpr):
    """[first, last) around the queries with an interval that meets keys [first_key, end_key); (queries, 0) if none."""
    first, last = queries, queries * 0
    for start in range(0, queries, BLOCK):
        rows = tl.minimum(start + tl.arange(0, BLOCK), queries - 1)
        start0, end0, start1, end1 = load_ranges(key_ranges, rows, queries)
        # [BLOCK]
        meets = tl.maximum(start0, first_key) < tl.minimum(end0, end_key)
        meets = meets | (tl.maximum(start1, first_key) < tl.minimum(end1, end_key))
        first = tl.minimum(first, tl.min(tl.where(meets, rows, queries), axis=0))
        last = tl.maximum(last, tl.max(tl.where(meets, rows + 1, 0), axis=0))
    return first, last


@Kernel
@triton.jit(do_not_specialize=("heads", "queries", "keys"))
def attention_backward_keys(
    grad_output, output_dot,  # [B, H, N, D]; [B, H, N] float32: T
    lse,  # [B, H, N] float32, contiguous; with a float mask [B, H, N, 2]: max, times UNITS, and 1 / sum
    query, key, value,  # [B, H, N, D], [B, H, M, D], [B, H, M, D]
    sup_q, sup_k, del_q, del_k, gate_q, gate_k,  # [B, N, R], [B, M, R], ..., [B, M, G]
    controls,  # [2] float32: strength, limit; or None
    attn_mask,  # [B, H, N, M] by strides: uint8 (0 hides) or floating (added)
    key_ranges,  # [B, N, 2, 2] int32, contiguous but for B
    grad_key, grad_value,  # [B, H, M, D], contiguous
    grad_sup, grad_del, grad_gate,  # [groups, B, M, R], [groups, B, M, R], [groups, B, M, G], contiguous
    scale, strength, limit,  # a strength of None is 1
    batch, heads, queries, keys,
    stride_o,  # of B, H and N of grad_output
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
):  # fmt: skip
    blocks, groups = tl.cdiv(keys, BLOCK_M), tl.cdiv(heads, HEADS_PER_PROGRAM)
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks % groups
    b = (tl.program_id(0) // blocks // groups).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    scale_of_logits = scale * UNITS
    strength, limit = strength_and_limit(controls, strength, limit)

    row_factors, factor_gradients = (), ()
    if ROUTED:
        row_factors = load_factors(
            (sup_k, del_k, gate_k), stride_factors_k, b, rows, keys, RANKS, PADDED_RANKS, GATE_COLUMNS
        )
        factor_gradients = factor_zeros(BLOCK_M, PADDED_RANKS, GATE_COLUMNS)
    key_rows, value_rows, key_gradients, value_gradients = (), (), (), ()
    for i in tl.static_range(HEADS_PER_PROGRAM):
        h = tl.minimum(group * HEADS_PER_PROGRAM + i, heads - 1).to(tl.int64)
        key_head, value_head = key + b * stride_k[0] + h * stride_k[1], value + b * stride_v[0] + h * stride_v[1]
        key_rows = key_rows + (load_rows(key_head, stride_k[2], rows, keys, D, BLOCK_D),)
        value_rows = value_rows + (load_rows(value_head, stride_v[2], rows, keys, D, BLOCK_D),)
        key_gradients = key_gradients + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
        value_gradients = value_gradients + (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)

    first, last, ranges_of_image = 0, queries, ()
    if RANGES:
        ranges_of_image = key_ranges + b * stride_ranges_b
        end_key = tl.minimum((block + 1) * BLOCK_M, keys)
        first, last = queries_seeing(ranges_of_image, block * BLOCK_M, end_key, queries, 128)

    for start in range(first // BLOCK_N * BLOCK_N, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        # [BLOCK_M, BLOCK_N]
        bias, column_factors, route, mask_pointers = tile_bias(
            b, rows, keys, columns, queries, row_factors, (sup_q, del_q, gate_q), stride_factors_q, strength, limit,
            ranges_of_image, attn_mask, stride_mask, False, ROUTED, MASK, MASK_OF_HEAD, RANGES, RANKS, PADDED_RANKS,
            GATE_COLUMNS, UNITS, FACTOR_PRECISION, FAST_SIGMOID,
        )  # fmt: skip

        grad_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        added_to_key, added_to_value = (), ()
        for i in tl.static_range(HEADS_PER_PROGRAM):
            h = tl.minimum(group * HEADS_PER_PROGRAM + i, heads - 1).to(tl.int64)
            # Queries beyond the last, and heads beyond the last, have lse = +inf, so that their P and dS are 0.
            count_of_head = tl.where(group * HEADS_PER_PROGRAM + i < heads, queries, 0)
            row_of_head = (b * heads + h) * queries
            # [BLOCK_N]
            if MASK != 2:
                natural = tl.load(lse + row_of_head + columns, mask=columns < count_of_head, other=float("inf"))
            output_dot_row = tl.load(output_dot + row_of_head + columns, mask=columns < queries, other=0.0)
            query_rows = load_head(query, stride_q, b, h, columns, queries, D, BLOCK_D)
            incoming = load_rows(
                grad_output + b * stride_o[0] + h * stride_o[1], stride_o[2], columns, queries, D, BLOCK_D
            )
            bias_of_head = bias
            if MASK_OF_HEAD:
                bias_of_head = add_mask(bias, mask_pointers + h * stride_mask[1], UNITS, MASK)
            # [BLOCK_M, BLOCK_N]
            inner = products(key_rows[i], query_rows, PRECISION)
            logits = logits_of(inner, scale_of_logits, bias_of_head, MASK != 0 or RANGES)
            if MASK == 2:
                pairs = lse + row_of_head * 2 + columns * 2
                largest = tl.load(pairs, mask=columns < count_of_head, other=float("inf"))
                inverse_sum = tl.load(pairs + 1, mask=columns < count_of_head, other=0.0)
                weights = exponential(logits - largest[None, :], UNITS) * inverse_sum[None, :]
            else:
                weights = exponential(logits - (natural * UNITS)[None, :], UNITS)
            # [BLOCK_M, BLOCK_D]
            added_to_value = added_to_value + (
                dot(rounded(weights, incoming.dtype), incoming, value_gradients[i], PRECISION),
            )
            # [BLOCK_M, BLOCK_N]
            grad_weights = products(value_rows[i], incoming, PRECISION)
            grad_logits = weights * (grad_weights - output_dot_row[None, :])
            if ROUTED:
                grad_bias += grad_logits
            # [BLOCK_M, BLOCK_D]
            added_to_key = added_to_key + (
                dot(rounded(grad_logits, query_rows.dtype), query_rows, key_gradients[i], PRECISION),
            )
        key_gradients, value_gradients = added_to_key, added_to_value
        if ROUTED:
            to_factors = route_adjoint(grad_bias, strength, route)
            factor_gradients = add_factor_gradients(
                factor_gradients, to_factors, column_factors, GATE_COLUMNS, FACTOR_PRECISION
            )

    for i in tl.static_range(HEADS_PER_PROGRAM):
        h = group * HEADS_PER_PROGRAM + i
        count_of_head = tl.where(h < heads, keys, 0)
        row_of_head = (b * heads + h) * keys
        # scale, without a scalar more to keep through the loop
        grad_key_rows = key_gradients[i] * (scale_of_logits / UNITS)
        store_rows(grad_key + row_of_head * D, D, rows, count_of_head, grad_key_rows, D, BLOCK_D)
        store_rows(grad_value + row_of_head * D, D, rows, count_of_head, value_gradients[i], D, BLOCK_D)
    if ROUTED:
        first_row = (group.to(tl.int64) * batch + b) * keys
        pointers = (grad_sup, grad_del, grad_gate)
        store_factors(pointers, first_row, rows, keys, factor_gradients, RANKS, PADDED_RANKS, GATE_COLUMNS)


@triton.jit
def _sum_group(parts, total, groups, size, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    added = tl.zeros([BLOCK], tl.float32)
    for group in range(0, groups):
        added += tl.load(parts + group * size.to(tl.int64) + elements, mask=elements < size, other=0.0)
    tl.store(total + elements, rounded(added, total.dtype.element_ty), mask=elements < size)


@Kernel
@triton.jit(do_not_specialize=("groups", "sup_size", "del_size", "gate_size"))
def sum_groups(
    sup_parts, del_parts, gate_parts,  # [groups, size] float32
    grad_sup, grad_del, grad_gate,  # [size]
    groups, sup_size, del_size, gate_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = sum of the parts of all groups of heads, in their order; the second axis of the grid is the factor."""
    if tl.program_id(1) == 0:
        _sum_group(sup_parts, grad_sup, groups, sup_size, BLOCK)
    elif tl.program_id(1) == 1:
        _sum_group(del_parts, grad_del, groups, del_size, BLOCK)
    else:
        _sum_group(gate_parts, grad_gate, groups, gate_size, BLOCK)
