"""Matching costs in Triton.

A program owns BLOCK_N predictions of a branch for one target, whose image it finds from the ends of the images. Each
cost is written once; boxes and logits come from the cache for all targets of an image but the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .block_sizes import config
from .language import generalized_iou, log_one_plus
from .launch import Grid, Kernel, blocks, kept, power_of_two


@Kernel
@triton.jit
def matching_cost_forward(
    logits_ptr,  # [B, G, N, K]
    lse_ptr,  # [B, G, N] or None
    boxes_ptr,  # [B, G, N, 4]
    true_boxes_ptr,  # [T, 4]
    labels_ptr,  # [T] int64
    ends_ptr,  # [B] int64, the target after each image's last
    output_ptr,  # [T, G, N]
    stride_lb, stride_lg, stride_ln, stride_bb, stride_bg, stride_bn, B, G, N, K,
    CLASS: tl.constexpr, L1: tl.constexpr, GIOU: tl.constexpr, ALPHA: tl.constexpr, REST: tl.constexpr,
    GAMMA: tl.constexpr, TINY: tl.constexpr, TERMS: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACCUMULATE: tl.constexpr = output_ptr.dtype.element_ty
    of_row = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // of_row).to(tl.int64)
    t, g = row // G, row % G
    b = tl.zeros([], tl.int64)
    for first in range(0, B, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B)
        b += tl.sum((tl.load(ends_ptr + i, i < B, other=t + 1) <= t).to(tl.int64), 0)
    # [BLOCK_N]
    n = (tl.program_id(0) % of_row).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    label = tl.load(labels_ptr + t)
    known = (label >= 0) & (label < K)
    at = b * stride_lb + g * stride_lg + n * stride_ln + tl.where(known, label, 0)
    x = tl.load(logits_ptr + at, mask & known, other=0.0).to(ACCUMULATE)
    if SOFTMAX:
        classes = -tl.exp(x - tl.load(lse_ptr + (b * G + g) * N + n, mask, other=0.0))
    else:
        e = tl.exp(-tl.abs(x))
        log_e = log_one_plus(e, TERMS)
        minus_log_p = tl.where(x > 0, 0.0, -x) + log_e
        minus_log_rest = tl.where(x > 0, x, 0.0) + log_e
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        p = tl.where(x > 0, larger, smaller)
        rest = tl.where(x > 0, smaller, larger)
        if_positive = rest * rest if GAMMA == 2.0 else tl.exp(minus_log_rest * -GAMMA)
        if_negative = p * p if GAMMA == 2.0 else tl.exp(minus_log_p * -GAMMA)
        classes = ALPHA * if_positive * minus_log_p - REST * if_negative * minus_log_rest
    box = boxes_ptr + b * stride_bb + g * stride_bg + n * stride_bn
    cx = tl.load(box, mask, other=0.0).to(ACCUMULATE)
    cy = tl.load(box + 1, mask, other=0.0).to(ACCUMULATE)
    w = tl.load(box + 2, mask, other=0.0).to(ACCUMULATE)
    h = tl.load(box + 3, mask, other=0.0).to(ACCUMULATE)
    true = true_boxes_ptr + t * 4
    tcx = tl.load(true)
    tcy = tl.load(true + 1)
    tw = tl.load(true + 2)
    th = tl.load(true + 3)
    giou = generalized_iou(
        cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h,
        tcx - 0.5 * tw, tcy - 0.5 * th, tcx + 0.5 * tw, tcy + 0.5 * th, TINY,
    )  # fmt: skip
    l1 = tl.abs(cx - tcx) + tl.abs(cy - tcy) + tl.abs(w - tw) + tl.abs(h - th)
    cost = CLASS * classes + L1 * l1 - GIOU * giou
    cost = tl.where((cost - cost == 0.0) & known, cost, -float("inf"))
    tl.store(output_ptr + row * N + n, cost, mask)


def forward(logits, lse, boxes, true_boxes, labels, counts, scalars, output) -> None:
    """Fills output [T, G, N]; counts: of the T targets, those of each of B images."""
    ends = torch.tensor(list(itertools.accumulate(counts)), device=logits.device)
    tensors = (logits, lse, boxes, true_boxes, labels, ends, output)
    matching_cost_forward[kept(_forward, tensors, tuple(scalars))](*tensors)


def _forward(tensors: Sequence[torch.Tensor | None], scalars: Sequence[float]) -> Grid:
    logits, lse, boxes, _, labels, _, output = tensors
    class_weight, l1_weight, giou_weight, alpha, gamma = scalars
    batch, branches, queries, classes = logits.shape
    settings = config("matching_cost_forward", output.device, output.dtype)
    return Grid(
        (len(labels) * branches * blocks(queries, settings["BLOCK_N"]),),
        *logits.stride()[:3], *boxes.stride()[:3], batch, branches, queries, classes,
        CLASS=class_weight, L1=l1_weight, GIOU=giou_weight, ALPHA=alpha, REST=1 - alpha, GAMMA=gamma,
        TINY=torch.finfo(output.dtype).tiny, TERMS=17 if output.dtype == torch.float64 else 7,
        SOFTMAX=lse is not None, BLOCK_B=min(power_of_two(batch), 1024), **settings,
    )  # fmt: skip
