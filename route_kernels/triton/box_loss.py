"""L1 and GIoU loss of matched boxes in Triton: a program owns BLOCK_M predictions, in either pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .block_sizes import config
from .language import at_least, generalized_iou, overlap_of, rounded
from .launch import Grid, Kernel, blocks, kept


@triton.jit
def _boxes(box, mask, ACCUMULATE: tl.constexpr):
    cx = tl.load(box, mask, other=0.5).to(ACCUMULATE)
    cy = tl.load(box + 1, mask, other=0.5).to(ACCUMULATE)
    w = tl.load(box + 2, mask, other=0.5).to(ACCUMULATE)
    h = tl.load(box + 3, mask, other=0.5).to(ACCUMULATE)
    return cx, cy, w, h


@triton.jit
def _pairs(boxes_ptr, true_boxes_ptr, target_ptr, stride_m, M, T, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's predictions m, which of them are matched, each one's box and that of its target."""
    # [BLOCK_M]
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + m, m < M, other=-1)
    matched = (target >= 0) & (target < T)
    cx, cy, w, h = _boxes(boxes_ptr + m * stride_m, matched, ACCUMULATE)
    tcx, tcy, tw, th = _boxes(true_boxes_ptr + target * 4, matched, ACCUMULATE)
    return m, matched, cx, cy, w, h, tcx, tcy, tw, th


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _side_gradient(low, high, true_low, true_high, by_inner, by_own, by_hull):
    """By the two ends of a side: what its own, the overlap's and the hull's side add; ends that tie have half each."""
    low_is_inner = tl.where(low > true_low, 1.0, tl.where(low == true_low, 0.5, 0.0))
    high_is_inner = tl.where(high < true_high, 1.0, tl.where(high == true_high, 0.5, 0.0))
    grad_low = -(by_inner * low_is_inner + by_hull * (1.0 - low_is_inner) + by_own)
    grad_high = by_inner * high_is_inner + by_hull * (1.0 - high_is_inner) + by_own
    return grad_low, grad_high


@Kernel
@triton.jit
def box_loss_forward(
    boxes_ptr,  # [M, 4]
    true_boxes_ptr,  # [T, 4]
    target_ptr,  # [M] int64
    output_ptr,  # [M, 2]
    stride_m, M, T,
    L1: tl.constexpr, GIOU: tl.constexpr, TINY: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    ACCUMULATE: tl.constexpr = output_ptr.dtype.element_ty
    m, matched, cx, cy, w, h, tcx, tcy, tw, th = _pairs(
        boxes_ptr, true_boxes_ptr, target_ptr, stride_m, M, T, ACCUMULATE, BLOCK_M
    )  # fmt: skip
    giou = 1.0 - generalized_iou(
        cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h,
        tcx - 0.5 * tw, tcy - 0.5 * th, tcx + 0.5 * tw, tcy + 0.5 * th, TINY,
    )  # fmt: skip
    l1 = tl.abs(cx - tcx) + tl.abs(cy - tcy) + tl.abs(w - tw) + tl.abs(h - th)
    tl.store(output_ptr + m * 2, tl.where(matched, L1 * l1, 0.0), m < M)
    tl.store(output_ptr + m * 2 + 1, tl.where(matched, GIOU * giou, 0.0), m < M)


@Kernel
@triton.jit
def box_loss_backward(
    grad_output_ptr,  # [M, 2]
    boxes_ptr,  # [M, 4]
    true_boxes_ptr,  # [T, 4]
    target_ptr,  # [M] int64
    grad_boxes_ptr,  # [M, 4]
    stride_m, M, T,
    L1: tl.constexpr, GIOU: tl.constexpr, TINY: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    ACCUMULATE: tl.constexpr = grad_output_ptr.dtype.element_ty
    STORED: tl.constexpr = grad_boxes_ptr.dtype.element_ty
    m, matched, cx, cy, w, h, tcx, tcy, tw, th = _pairs(
        boxes_ptr, true_boxes_ptr, target_ptr, stride_m, M, T, ACCUMULATE, BLOCK_M
    )  # fmt: skip
    by_l1 = L1 * tl.load(grad_output_ptr + m * 2, matched, other=0.0)
    by_giou = GIOU * tl.load(grad_output_ptr + m * 2 + 1, matched, other=0.0)
    x0, y0, x1, y1 = cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h
    tx0, ty0, tx1, ty1 = tcx - 0.5 * tw, tcy - 0.5 * th, tcx + 0.5 * tw, tcy + 0.5 * th
    width, height, hull_width, hull_height, inner, both, hull = overlap_of(x0, y0, x1, y1, tx0, ty0, tx1, ty1)
    # d giou = -(1 / U) dI + (I / U^2 - 1 / C) dU + (U / C^2) dC, where a side is not clamped to 0
    safe_both, safe_hull = at_least(both, TINY), at_least(hull, TINY)
    by_both = tl.where(both < TINY, 0.0, inner / safe_both / safe_both) - 1.0 / safe_hull
    by_inner = -1.0 / safe_both - by_both
    by_hull = 1.0 / safe_hull - tl.where(hull < TINY, 0.0, (hull - both) / safe_hull / safe_hull)
    gx0, gx1 = _side_gradient(
        x0, x1, tx0, tx1, tl.where(width < 0, 0.0, by_inner * at_least(height, 0.0)),
        tl.where(x1 - x0 < 0, 0.0, by_both * at_least(y1 - y0, 0.0)),
        tl.where(hull_width < 0, 0.0, by_hull * at_least(hull_height, 0.0)),
    )  # fmt: skip
    gy0, gy1 = _side_gradient(
        y0, y1, ty0, ty1, tl.where(height < 0, 0.0, by_inner * at_least(width, 0.0)),
        tl.where(y1 - y0 < 0, 0.0, by_both * at_least(x1 - x0, 0.0)),
        tl.where(hull_height < 0, 0.0, by_hull * at_least(hull_width, 0.0)),
    )  # fmt: skip
    to = grad_boxes_ptr + m * 4
    tl.store(to, rounded(by_l1 * _sign(cx - tcx) + by_giou * (gx0 + gx1), STORED), m < M)
    tl.store(to + 1, rounded(by_l1 * _sign(cy - tcy) + by_giou * (gy0 + gy1), STORED), m < M)
    tl.store(to + 2, rounded(by_l1 * _sign(w - tw) + by_giou * (gx1 - gx0) * 0.5, STORED), m < M)
    tl.store(to + 3, rounded(by_l1 * _sign(h - th) + by_giou * (gy1 - gy0) * 0.5, STORED), m < M)


def forward(boxes, true_boxes, target, weights, output) -> None:
    """Fills the losses [M, 2] of boxes [M, 4]."""
    tensors = (boxes, true_boxes, target, output)
    box_loss_forward[kept(_grid, tensors, "box_loss_forward", 0, tuple(weights))](*tensors)


def backward(grad_output, boxes, true_boxes, target, weights, grads) -> None:
    """Fills the gradient of the boxes [M, 4]."""
    tensors = (grad_output, boxes, true_boxes, target, *grads)
    box_loss_backward[kept(_grid, tensors, "box_loss_backward", 1, tuple(weights))](*tensors)


def _grid(tensors: Sequence[torch.Tensor], kernel: str, at: int, weights: Sequence[float]) -> Grid:
    boxes, true_boxes = tensors[at : at + 2]
    settings = config(kernel, boxes.device, boxes.dtype)
    return Grid(
        (blocks(len(boxes), settings["BLOCK_M"]),), boxes.stride(0), len(boxes), len(true_boxes),
        L1=weights[0], GIOU=weights[1], TINY=torch.finfo(true_boxes.dtype).tiny, **settings,
    )  # fmt: skip
