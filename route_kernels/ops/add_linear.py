"""A linear layer of a sum that keeps the two terms and not the sum: a position added before a projection.

    y = (x + position) W^T + bias

T tokens, C channels, O output channels. Both terms are there anyway (the layer's input, and one position for all
layers), so nothing is kept; backward adds them again, and casts the sum again under autocast, CHUNKS parts of the batch
one after the other.
"""

from __future__ import annotations

import math

import torch

from ..precision import accumulate_dtype
from .contract import expect_same_device, expect_shape, expect_tensors
from .flop import count_flop
from .products import (
    add_product,
    autocast_dtype,
    expect_dtypes,
    linear_into,
    new_workspace,
    parts_of,
    plain_form,
    rows_of,
    rows_of_chunk,
    sum_of_rows,
)
from .registry import Backward, register

OP = "add_linear"
CHUNKS = 8


def add_linear(
    x: torch.Tensor, position: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """linear(x + position, weight, bias) that keeps x and position for backward instead of their sum.

    Args:
        x: [B, N, C], float16, bfloat16, float32 or float64.
        position: [B or 1, N, C].
        weight: [O, C], bias: [O] or None. All in the dtype of x; under autocast in any.

    Returns:
        [B, N, O] in the dtype of x; under autocast product and result are in the autocast dtype.

    Raises:
        ValueError: a shape or device is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        RuntimeError: a second derivative was asked (`backend("reference")` has it).
    """
    expect_tensors(OP, x=x, position=position, weight=weight, **({} if bias is None else {"bias": bias}))
    dtype = autocast_dtype(x)
    plain = plain_form()
    if plain is not None:
        check(x, position, weight, bias, dtype)
        return plain.add_linear(x, position, weight, bias, dtype)
    return torch.ops.route_kernels.add_linear(x, position, weight, bias, dtype)[0]


def check(x, position, weight, bias, dtype) -> None:
    """The contract, for real and fake tensors alike; `dtype` is that of the product, None without autocast."""
    expect_shape(OP, "x", x, "B", "N", "C")
    batch, tokens, channels = x.shape
    expect_shape(OP, "position", position, "B or 1", ("N", tokens), ("C", channels))
    if position.shape[0] not in (1, batch):
        raise ValueError(
            f"{OP}: position: expected shape [B={batch} or 1, N={tokens}, C={channels}], got {list(position.shape)}"
        )
    expect_shape(OP, "weight", weight, "O", ("C", channels))
    if bias is not None:
        expect_shape(OP, "bias", bias, ("O", weight.shape[0]))
    expect_dtypes(OP, dtype, x, position=position, weight=weight, bias=bias)
    expect_same_device(OP, ("x", x), position=position, weight=weight, bias=bias)


def _forward_parts(x, position, weight, bias, dtype):
    """[sum of some images], [it in the dtype of the product], [weight and bias in that dtype]."""
    of_sum = torch.promote_types(x.dtype, position.dtype)
    rows = rows_of_chunk(x.shape[0], CHUNKS) * x.shape[1]
    parts = [((rows, x.shape[2]), of_sum)]
    if of_sum != dtype:
        parts.append(((rows, x.shape[2]), dtype))
    return parts + [(tuple(w.shape), dtype) for w in (weight, bias) if w is not None and w.dtype != dtype]


def _cast(parts: list[torch.Tensor], dtype: torch.dtype, *parameters: torch.Tensor | None):
    """Where a sum is written, where it is in the dtype of the product, and the parameters in it."""
    total, *rest = parts
    short = total if total.dtype == dtype else rest.pop(0)
    return total, short, *(w if w is None or w.dtype == dtype else rest.pop(0).copy_(w) for w in parameters)


def _sum_into(total: torch.Tensor, short: torch.Tensor, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """x [b, N, C] + position [b, N, C] as rows [b N, C] of `short`, by way of `total`."""
    rows = x.shape[0] * x.shape[1]
    torch.add(x, position, out=total[:rows].view(x.shape))
    return total[:rows] if short is total else short[:rows].copy_(total[:rows])


def _images(*tensors: torch.Tensor):
    """The tensors [B, ...] in parts of the same images."""
    size = max(rows_of_chunk(tensors[0].shape[0], CHUNKS), 1)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _kernel(x, position, weight, bias, dtype):
    output, workspace = _fake(x, position, weight, bias, dtype)
    dtype = output.dtype
    parts = parts_of(workspace, _forward_parts(x, position, weight, bias, dtype))
    total, short, weight, bias = _cast(parts, dtype, weight, bias)
    for x_part, of_part, result in _images(x, position.expand_as(x), output):
        linear_into(rows_of(result), _sum_into(total, short, x_part, of_part), weight, bias)
    return output, workspace


def _fake(x, position, weight, bias, dtype):
    check(x, position, weight, bias, dtype)
    dtype = x.dtype if dtype is None else dtype
    output = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    return output, new_workspace(_forward_parts(x, position, weight, bias, dtype), x)


def _backward_parts(x, position, weight, dtype):
    """[sums and a product of the weight's gradient], then as forward."""
    sums = accumulate_dtype(dtype)
    of_weight = [(tuple(weight.shape), sums)] if weight.dtype != sums else []
    of_weight += [(tuple(weight.shape), dtype)] if dtype != sums else []
    return [*of_weight, *_forward_parts(x, position, weight, None, dtype)]


def _backward_kernel(grad_output, x, position, weight, bias, dtype):
    *grads, workspace = _backward_fake(grad_output, x, position, weight, bias, dtype)
    grad_sum, grad_weight = grads[:2]
    dtype = grad_output.dtype
    sums = accumulate_dtype(dtype)
    parts = parts_of(workspace, _backward_parts(x, position, weight, dtype))
    total_weight = grad_weight if grad_weight.dtype == sums else parts.pop(0)
    product = None if dtype == sums else parts.pop(0)
    total, short, weight = _cast(parts, dtype, weight)
    if x.numel() == 0:
        workspace.zero_()
    every = _images(grad_output, x, position.expand_as(x), grad_sum)
    for chunk, (grad_part, x_part, of_part, result) in enumerate(every):
        grad_rows, result_rows = rows_of(grad_part), rows_of(result)
        add_product(total_weight, grad_rows, _sum_into(total, short, x_part, of_part), product, chunk == 0)
        if result.dtype == dtype:
            torch.mm(grad_rows, weight, out=result_rows)
        else:
            result_rows.copy_(torch.mm(grad_rows, weight, out=short[: result_rows.shape[0]]))
    if grad_weight is not total_weight:
        grad_weight.copy_(total_weight)
    if bias is not None:
        grads[2].copy_(sum_of_rows(rows_of(grad_output)))
    return [*grads, workspace]


def _backward_fake(grad_output, x, position, weight, bias, dtype):
    grads = [x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, position.dtype)), weight.new_empty(weight.shape)]
    if bias is not None:
        grads.append(bias.new_empty(bias.shape))
    return [*grads, new_workspace(_backward_parts(x, position, weight, grad_output.dtype), x)]


def _gradients(grads, given):
    grad_sum, grad_weight, *others = grads
    grad_bias = None if given["bias"] is None else others[0]
    return {"x": grad_sum, "position": grad_sum, "weight": grad_weight, "bias": grad_bias}


_INPUTS = "Tensor x, Tensor position, Tensor weight, Tensor? bias, ScalarType? dtype"

register(
    f"add_linear({_INPUTS}) -> (Tensor output, Tensor workspace)",
    _kernel,
    _fake,
    Backward(
        f"add_linear_backward(Tensor grad_output, {_INPUTS}) -> Tensor[]", _backward_kernel, _backward_fake, _gradients
    ),
)


def _flop(x, position, weight, *_, **__) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _backward_flop(grad_output, x, position, weight, *_, **__) -> int:
    return 4 * math.prod(x[:-1]) * math.prod(weight)


count_flop(OP, _flop, _backward_flop)
