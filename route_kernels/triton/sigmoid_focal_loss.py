"""Sigmoid focal loss in Triton.

A program owns BLOCK_T queries and walks over their classes. Both passes read and write each logit once: memory is the
floor of backward, three special functions a logit that of forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .block_sizes import config
from .language import log_one_plus, rounded
from .launch import Grid, Kernel, blocks, kept, power_of_two


@Kernel
@triton.jit
def sigmoid_focal_loss_forward(
    logits_ptr,  # [T, K]
    targets_ptr,  # [T] int64
    loss_ptr,  # [T]
    grad_ptr,  # [T, K]
    stride_lt, T, K,
    ALPHA: tl.constexpr, REST: tl.constexpr,  # 1 - alpha
    GAMMA: tl.constexpr, SCALE: tl.constexpr, TERMS: tl.constexpr, DIFFERENTIATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ACCUMULATE: tl.constexpr = loss_ptr.dtype.element_ty
    # [BLOCK_T]
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    target = tl.load(targets_ptr + t, t < T, other=-1)
    loss = tl.zeros([BLOCK_T], ACCUMULATE)
    alpha, rest = tl.full([], ALPHA, ACCUMULATE), tl.full([], REST, ACCUMULATE)  # tl.where of two numbers is float32
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        # [BLOCK_T, BLOCK_K]
        mask = (t < T)[:, None] & (k < K)[None, :]
        positive = target[:, None] == k[None, :]
        x = tl.load(logits_ptr + t[:, None] * stride_lt + k[None, :], mask, other=0.0).to(ACCUMULATE)
        z = tl.where(positive, -x, x)
        e = tl.exp(-tl.abs(z))
        log_e = log_one_plus(e, TERMS)
        softplus = tl.where(z > 0, z, 0.0) + log_e
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        q = tl.where(z > 0, larger, smaller)
        power = q * q if GAMMA == 2.0 else tl.exp((tl.where(z > 0, 0.0, -z) + log_e) * -GAMMA)
        loss += tl.sum(tl.where(mask, tl.where(positive, alpha, rest) * power * softplus, 0.0), 1)
        if DIFFERENTIATED:
            p_t = tl.where(z > 0, smaller, larger)
            grad = tl.where(positive, -alpha, rest) * power * (GAMMA * p_t * softplus + q) * SCALE
            tl.store(grad_ptr + t[:, None] * K + k[None, :], rounded(grad, grad_ptr.dtype.element_ty), mask)
    tl.store(loss_ptr + t, loss, t < T)


@Kernel
@triton.jit
def sigmoid_focal_loss_backward(
    grad_loss_ptr,  # [T]
    grad_ptr,  # [T, K]
    grad_logits_ptr,  # [T, K]
    T, K,
    SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ACCUMULATE: tl.constexpr = grad_loss_ptr.dtype.element_ty
    # [BLOCK_T]
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    factor = tl.load(grad_loss_ptr + t, t < T, other=0.0) * SCALE
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        # [BLOCK_T, BLOCK_K]
        mask = (t < T)[:, None] & (k < K)[None, :]
        grad = tl.load(grad_ptr + t[:, None] * K + k[None, :], mask, other=0.0).to(ACCUMULATE) * factor[:, None]
        tl.store(grad_logits_ptr + t[:, None] * K + k[None, :], rounded(grad, grad_logits_ptr.dtype.element_ty), mask)


def forward(logits, targets, alpha, gamma, scale, loss, grad) -> None:
    """Fills loss [T] and, where it is given, grad [T, K] of logits [T, K] and targets [T]."""
    tensors = (logits, targets, loss, grad)
    sigmoid_focal_loss_forward[kept(_forward, tensors, alpha, gamma, scale)](*tensors)


def _forward(tensors: Sequence[torch.Tensor | None], alpha: float, gamma: float, scale: float) -> Grid:
    logits, _, _, grad = tensors
    queries, classes = logits.shape
    settings = _settings("sigmoid_focal_loss_forward", logits)
    return Grid(
        (blocks(queries, settings["BLOCK_T"]),), logits.stride(0), queries, classes,
        ALPHA=alpha, REST=1 - alpha, GAMMA=gamma, SCALE=scale, TERMS=17 if logits.dtype == torch.float64 else 7,
        DIFFERENTIATED=grad is not None, **settings,
    )  # fmt: skip


def backward(grad_loss, grad, scale, grads) -> None:
    """Fills the gradient of logits [T, K], scale grad_loss [T] grad [T, K]."""
    tensors = (grad_loss, grad, *grads)
    sigmoid_focal_loss_backward[kept(_backward, tensors, scale)](*tensors)


def _backward(tensors: Sequence[torch.Tensor], scale: float) -> Grid:
    queries, classes = tensors[1].shape
    settings = _settings("sigmoid_focal_loss_backward", tensors[1])
    return Grid((blocks(queries, settings["BLOCK_T"]),), queries, classes, SCALE=scale, **settings)


def _settings(kernel_name: str, logits: torch.Tensor) -> dict[str, int]:
    """A tile of BLOCK_TK elements, with no more classes than there are."""
    settings = dict(config(kernel_name, logits.device, logits.dtype, K=logits.shape[1]))
    elements = settings.pop("BLOCK_TK")
    width = min(power_of_two(logits.shape[1]), elements)
    return {"BLOCK_T": elements // width, "BLOCK_K": width, **settings}
