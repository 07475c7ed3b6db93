"""From the gradient of softmaxed weights to that of their logits, a row of K points of one query and head each."""

import triton
import triton.language as tl


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
