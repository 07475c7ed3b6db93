"""LayerNorm of a residual sum in Triton.

Forward: a program owns BLOCK_T tokens. Backward: a program owns one part of the tokens, BLOCK_T at a time, and with it
one row of the sums over tokens: no atomics. Both read and write each tensor once, so memory is their floor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .block_sizes import config
from .language import rounded
from .launch import Grid, Kernel, blocks, kept, power_of_two


@Kernel
@triton.jit
def add_layer_norm_forward(
    x_ptr, residual_ptr,  # [T, C]
    weight_ptr, bias_ptr,  # [C]
    channels_ptr,  # [KEPT] int32
    output_ptr,  # [T, C]
    rstd_ptr,  # [T]
    normalized_ptr,  # [T, KEPT]
    stride_xt, stride_rt, T,
    C: tl.constexpr, EPS: tl.constexpr, KEPT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    ACCUMULATE: tl.constexpr = rstd_ptr.dtype.element_ty
    OUTPUT: tl.constexpr = output_ptr.dtype.element_ty
    # [BLOCK_T]
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    # [BLOCK_T, BLOCK_C]
    mask = (t < T)[:, None] & (c < C)[None, :]
    s = tl.load(x_ptr + t[:, None] * stride_xt + c[None, :], mask, other=0.0).to(ACCUMULATE)
    s += tl.load(residual_ptr + t[:, None] * stride_rt + c[None, :], mask, other=0.0).to(ACCUMULATE)
    mean = tl.sum(s, 1) / C
    centred = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
    x_hat = centred * rstd[:, None]
    # [BLOCK_C]
    weight = tl.load(weight_ptr + c, c < C, other=0.0).to(ACCUMULATE)
    bias = tl.load(bias_ptr + c, c < C, other=0.0).to(ACCUMULATE)
    y = x_hat * weight[None, :] + bias[None, :]
    tl.store(output_ptr + t[:, None] * C + c[None, :], rounded(y, OUTPUT), mask)
    tl.store(rstd_ptr + t, rstd, t < T)
    if KEPT == C:
        tl.store(normalized_ptr + t[:, None] * C + c[None, :], rounded(x_hat, OUTPUT), mask)
    elif KEPT > 0:
        # [BLOCK_T, KEPT], read again where the row has just been
        k = tl.arange(0, KEPT)
        channel = tl.load(channels_ptr + k)
        inside = (t < T)[:, None] & (k < KEPT)[None, :]
        s = tl.load(x_ptr + t[:, None] * stride_xt + channel[None, :], inside, other=0.0).to(ACCUMULATE)
        s += tl.load(residual_ptr + t[:, None] * stride_rt + channel[None, :], inside, other=0.0).to(ACCUMULATE)
        x_hat = (s - mean[:, None]) * rstd[:, None]
        tl.store(normalized_ptr + t[:, None] * KEPT + k[None, :], rounded(x_hat, OUTPUT), inside)


@Kernel
@triton.jit
def add_layer_norm_backward(
    grad_output_ptr,  # [T, C]
    output_ptr,  # [T, C]
    rstd_ptr,  # [T]
    normalized_ptr,  # [T, KEPT]
    channels_ptr,  # [KEPT] int32
    weight_ptr, bias_ptr,  # [C]
    grad_sum_ptr,  # [T, C]
    sums_ptr,  # [parts, 2, C]
    stride_gt, T, parts,
    C: tl.constexpr, KEPT: tl.constexpr, ROUNDOFF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    ACCUMULATE: tl.constexpr = rstd_ptr.dtype.element_ty
    OUTPUT: tl.constexpr = grad_sum_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    # [BLOCK_C]
    weight = tl.load(weight_ptr + c, c < C, other=0.0).to(ACCUMULATE)
    bias = tl.load(bias_ptr + c, c < C, other=0.0).to(ACCUMULATE)
    # NaN where rounding of y has left nothing of x^
    usable = tl.abs(weight) > ROUNDOFF * tl.abs(bias)
    inverse_weight = tl.where(c < C, 1.0 / tl.where(usable, weight, float("nan")), 0.0)
    # [BLOCK_T, BLOCK_C]
    weight_sum = tl.zeros([BLOCK_T, BLOCK_C], ACCUMULATE)
    bias_sum = tl.zeros([BLOCK_T, BLOCK_C], ACCUMULATE)
    end = (part + 1) * T // parts
    for first in range(part * T // parts, end, BLOCK_T):
        # [BLOCK_T]
        t = first + tl.arange(0, BLOCK_T)
        # [BLOCK_T, BLOCK_C]
        mask = (t < end)[:, None] & (c < C)[None, :]
        dy = tl.load(grad_output_ptr + t[:, None] * stride_gt + c[None, :], mask, other=0.0).to(ACCUMULATE)
        if KEPT == C:
            x_hat = tl.load(normalized_ptr + t[:, None] * C + c[None, :], mask, other=0.0).to(ACCUMULATE)
        else:
            y = tl.load(output_ptr + t[:, None] * C + c[None, :], mask, other=0.0).to(ACCUMULATE)
            x_hat = (y - bias[None, :]) * inverse_weight[None, :]
            for k in tl.static_range(KEPT):
                kept = tl.load(normalized_ptr + t * KEPT + k, t < end, other=0.0).to(ACCUMULATE)
                x_hat = tl.where((c == tl.load(channels_ptr + k))[None, :], kept[:, None], x_hat)
            x_hat = tl.where((t < end)[:, None], x_hat, 0.0)
        weight_sum += dy * x_hat
        bias_sum += dy
        g = dy * weight[None, :]
        mean_g = tl.sum(g, 1) / C
        mean_g_x_hat = tl.sum(g * x_hat, 1) / C
        rstd = tl.load(rstd_ptr + t, t < end, other=0.0)
        grad = (g - mean_g[:, None] - x_hat * mean_g_x_hat[:, None]) * rstd[:, None]
        tl.store(grad_sum_ptr + t[:, None] * C + c[None, :], rounded(grad, OUTPUT), mask)
    sums_ptr += part * 2 * C
    tl.store(sums_ptr + c, tl.sum(weight_sum, 0), c < C)
    tl.store(sums_ptr + C + c, tl.sum(bias_sum, 0), c < C)


def forward(x, residual, weight, bias, channels, eps, outputs) -> None:
    """Fills the outputs [T, C], rstd [T] and normalized [T, kept] from x and residual [T, C]."""
    tensors = (x, residual, weight, bias, channels, *outputs)
    add_layer_norm_forward[kept(_forward, tensors, eps)](*tensors)


def _forward(tensors: Sequence[torch.Tensor], eps: float) -> Grid:
    x, residual, _, _, channels, output, _, _ = tensors
    tokens, width = output.shape
    settings = _settings("add_layer_norm_forward", output)
    return Grid(
        (blocks(tokens, settings["BLOCK_T"]),), x.stride(0), residual.stride(0), tokens,
        C=width, EPS=eps, KEPT=channels.shape[0], **settings,
    )  # fmt: skip


def backward(grad_output, outputs, channels, weight, bias, grads) -> None:
    """Fills the gradient of the sum [T, C] and the sums [parts, 2, C] of weight's and bias's."""
    tensors = (grad_output, *outputs, channels, weight, bias, *grads)
    add_layer_norm_backward[kept(_backward, tensors)](*tensors)


def _backward(tensors: Sequence[torch.Tensor]) -> Grid:
    grad_output, output, _, _, channels, *_, sums = tensors
    tokens, width = output.shape
    settings = _settings("add_layer_norm_backward", output)
    return Grid(
        (sums.shape[0],), grad_output.stride(0), tokens, sums.shape[0],
        C=width, KEPT=channels.shape[0], ROUNDOFF=torch.finfo(output.dtype).eps / 2, **settings,
    )  # fmt: skip


def _settings(kernel_name: str, output: torch.Tensor) -> dict[str, int]:
    """A tile of about BLOCK_TC elements, each row whole."""
    width = power_of_two(output.shape[1])
    settings = dict(config(kernel_name, output.device, output.dtype, C=output.shape[1]))
    return {"BLOCK_T": max(settings.pop("BLOCK_TC") // width, 1), "BLOCK_C": width, **settings}
