"""Residual sum and LayerNorm in one pass; backward starts from the output, which the next layer keeps anyway.

    s = x + residual,   x^ = (s - mean s) rstd,   rstd = 1 / sqrt(var s + eps),   y = weight x^ + bias

    g = weight dy,   ds = rstd (g - mean g - x^ mean(g x^)),   dweight = sum_t dy x^,   dbias = sum_t dy

T tokens, C channels. Kept are y and rstd [T]; x^ = (y - bias) / weight. Rounding of y costs x^ an error of
u |x^ + bias / weight|, u the unit roundoff, where PyTorch's LayerNorm of a rounded sum has u |s| rstd: much the same
while |bias| is not far above |weight|. It is lost where the weight is 0, so x^ of the `SPARE` channels that would lose
most is kept beside y: they are chosen on the device, by |weight| / (|weight| + |bias|). Should more than that be lost
altogether, |weight| <= u |bias|, gradients are NaN rather than wrong: such a layer takes keep="normalized".
"""

from __future__ import annotations

import math

import torch

from .. import backends
from ..precision import accumulate_dtype, autocast_dtype
from .contract import (
    as_rows,
    expect_choice,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    may_be_differentiated,
    number,
)
from .flop import count_flop
from .registry import Backward, register

OP = "add_layer_norm"
KEEP = ("output", "normalized")
SPARE = 4
TOKENS_OF_SUM, SUMS = 64, 512
"""Sums over tokens are taken in at most SUMS parts of at least TOKENS_OF_SUM: one order of adding on any device."""


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    keep: str = "output",
) -> torch.Tensor:
    """layer_norm(x + residual, [C], weight, bias, eps) that keeps neither the sum nor the inputs.

    Args:
        x: [..., C], float16, bfloat16, float32 or float64.
        residual: [..., C], floating; sums and statistics are float32 (float64 for float64), whatever the dtypes.
        weight: [C], bias: [C], in the dtype of the result or float32.
        eps: added to the variance, which divides by C.
        keep: what backward starts from. "output": y, 1 / deviation of each token, and x^ of four channels.
            "normalized": all of x^, one more tensor [..., C], for weights of which more than four may be 0.

    Returns:
        [..., C] in the wider dtype of x and residual; float32 under autocast (float64 stays), as layer_norm.

    Raises:
        ValueError: a shape, device, eps or keep is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        BackendUnavailableError: an explicitly requested backend cannot run.
        RuntimeError: a second derivative was asked of a fused kernel.
    """
    expect_tensors(OP, x=x, residual=residual, weight=weight, bias=bias)
    expect_choice(OP, "keep", keep, KEEP)
    expect_floating(OP, "x", x)
    expect_floating(OP, "residual", residual)
    eps = number(OP, "eps", eps)
    dtype = _output_dtype(x, residual)
    chosen = backends.choose(OP, x, residual, weight, bias)
    inputs = (x, residual, weight, bias)
    plain = backends.plain(OP, chosen)
    if plain is not None:
        check(*inputs, eps, dtype)
        return plain(*inputs, eps, dtype)
    channels = weight.shape[0] if weight.dim() else 0
    kept = (channels if keep == "normalized" else min(SPARE, channels)) if may_be_differentiated(*inputs) else 0
    return torch.ops.route_kernels.add_layer_norm(*inputs, eps, kept, dtype, chosen)[0]


def _output_dtype(x: torch.Tensor, residual: torch.Tensor) -> torch.dtype:
    dtype = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    return dtype if autocast_dtype(x.device) is None else accumulate_dtype(dtype)


def check(x, residual, weight, bias, eps, dtype) -> None:
    """The contract, for real and fake tensors alike."""
    if x.dim() < 1:
        raise ValueError(f"{OP}: x: expected shape [..., C], got []")
    if residual.shape != x.shape:
        raise ValueError(f"{OP}: residual: expected shape {list(x.shape)} like x, got {list(residual.shape)}")
    expect_shape(OP, "weight", weight, ("C", x.shape[-1]))
    expect_shape(OP, "bias", bias, ("C", x.shape[-1]))
    expect_floating(OP, "x", x)
    expect_floating(OP, "residual", residual)
    for name, parameter in (("weight", weight), ("bias", bias)):
        expect_floating(OP, name, parameter, (dtype, accumulate_dtype(dtype)))
    if not eps >= 0:
        raise ValueError(f"{OP}: eps: expected a number >= 0, got {eps}")
    expect_same_device(OP, ("x", x), residual=residual, weight=weight, bias=bias)


def spare_channels(weight: torch.Tensor, bias: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [count]: where x^ is hardest to get back, smallest |weight| / (|weight| + |bias|) first."""
    size, shift = weight.detach().abs().float(), bias.detach().abs().float()
    share = (size / (size + shift)).nan_to_num(nan=-1.0)
    return share.topk(count, largest=False, sorted=False).indices.int()


def _new_outputs(x, residual, weight, bias, eps, kept, dtype, backend):
    """y [..., C], rstd [...] in the dtype of sums, x^ of the kept channels [..., kept], which are int32 [kept]."""
    check(x, residual, weight, bias, eps, dtype)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:-1], dtype=accumulate_dtype(dtype)),
        x.new_empty(*x.shape[:-1], kept, dtype=dtype),
        x.new_empty(kept, dtype=torch.int32),
    )


def _kernel(x, residual, weight, bias, eps, kept, dtype, backend):
    output, rstd, normalized, channels = outputs = _new_outputs(x, residual, weight, bias, eps, kept, dtype, backend)
    channels.copy_(spare_channels(weight, bias, kept))
    if x.numel():
        backends.kernel(OP, "forward", backend)(
            as_rows(x), as_rows(residual), weight.contiguous(), bias.contiguous(), channels, eps,
            [as_rows(output), rstd.view(-1), normalized.view(rstd.numel(), kept)],
        )  # fmt: skip
    return outputs


def _new_grads(grad_output, output, *others) -> list[torch.Tensor]:
    """The gradient of s [..., C], and those of weight and bias over each part of the tokens: [parts, 2, C]."""
    channels = output.shape[-1]
    tokens = output.numel() // max(channels, 1)
    parts = torch.sym_min(SUMS, -(-tokens // TOKENS_OF_SUM))
    sums = output.new_empty(parts, 2, channels, dtype=accumulate_dtype(output.dtype))
    return [output.new_empty(output.shape), sums]


def _backward_kernel(grad_output, output, rstd, normalized, channels, weight, bias, backend):
    grad_sum, sums = grads = _new_grads(grad_output, output)
    if output.numel():
        outputs = [as_rows(output), rstd.view(-1), normalized.view(rstd.numel(), channels.numel())]
        backends.kernel(OP, "backward", backend)(
            as_rows(grad_output), outputs, channels, weight.contiguous(), bias.contiguous(), [as_rows(grad_sum), sums]
        )
    return grads


def _gradients(grads, given):
    grad_sum, sums = grads
    grad_weight, grad_bias = sums.sum(0).unbind()
    return {"x": grad_sum, "residual": grad_sum, "weight": grad_weight, "bias": grad_bias}


register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, SymInt kept, ScalarType dtype, "
    "str backend) -> (Tensor output, Tensor rstd, Tensor normalized, Tensor channels)",
    _kernel,
    _new_outputs,
    Backward(
        "add_layer_norm_backward(Tensor grad_output, Tensor output, Tensor rstd, Tensor normalized, Tensor channels, "
        "Tensor weight, Tensor bias, str backend) -> Tensor[]",
        _backward_kernel,
        _new_grads,
        _gradients,
    ),
)


def _flop(x, *_, **__) -> int:
    """An element has the sum t, its share of the mean, t - mean, its square added; x^ = that rstd; w x^ + b."""
    return 8 * math.prod(x)


def _backward_flop(grad_output, *_, **__) -> int:
    """An element has x^ from y, dx^ = dy w; its shares of two means, dw and db; rstd (dx^ - mean - x^ mean)."""
    return 13 * math.prod(grad_output)


count_flop(OP, _flop, _backward_flop)
