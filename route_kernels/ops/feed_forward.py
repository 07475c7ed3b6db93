"""The feed-forward block of a transformer layer, whose hidden layer is computed again in backward.

    y = activation(x W1^T + b1) W2^T + b2

T tokens, C channels, F hidden channels, O output channels. The hidden layer [T, F] is the largest tensor that a
transformer layer keeps; here no more than T / chunks rows of it exist at a time, in either pass, and backward keeps x
alone. The price is the first product once more: with O = C, a sixth of the block's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..precision import accumulate_dtype
from ..reference.feed_forward import ACTIVATIONS
from .contract import expect_choice, expect_same_device, expect_shape, expect_tensors, integer
from .flop import count_flop
from .products import (
    add_product,
    autocast_dtype,
    count_of_rows,
    expect_dtypes,
    in_dtype,
    linear_into,
    new_workspace,
    parts_of,
    plain_form,
    rows_of,
    rows_of_chunk,
    sum_of_rows,
)
from .registry import Backward, register

OP = "feed_forward"
_aten = torch.ops.aten

_FORWARD: dict[str, Callable] = {
    "relu": lambda x, out: torch.clamp_min(x, 0, out=out),  # relu.out makes a copy first
    "gelu": _aten.gelu.out,
    "silu": _aten.silu.out,
}


def feed_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str = "relu",
    chunks: int = 8,
) -> torch.Tensor:
    """linear(activation(linear(x, w1, b1)), w2, b2) that keeps nothing of the hidden layer for backward.

    Args:
        x: [..., C], float16, bfloat16, float32 or float64.
        w1: [F, C], b1: [F] or None, w2: [O, F], b2: [O] or None, in the dtype of x; under autocast in any.
        activation: "relu", "gelu" (exact, with erf) or "silu".
        chunks: the tokens are taken in this many parts; the workspace is 2 T F / chunks elements.

    Returns:
        [..., O] in the dtype of x. Under autocast products are in the autocast dtype and so is the result; the casts
        are repeated in backward, not kept. Weight gradients are summed over chunks in float32 (float64 for float64).

    Raises:
        ValueError: a shape, device, activation or number of chunks is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        RuntimeError: a second derivative was asked (`backend("reference")` has it, and keeps the hidden layer).
    """
    biases = {name: bias for name, bias in (("b1", b1), ("b2", b2)) if bias is not None}
    expect_tensors(OP, x=x, w1=w1, w2=w2, **biases)
    expect_choice(OP, "activation", activation, ACTIVATIONS)
    chunks = integer(OP, "chunks", chunks)
    dtype = autocast_dtype(x)
    plain = plain_form()
    if plain is not None:
        check(x, w1, b1, w2, b2, activation, chunks, dtype)
        return plain.feed_forward(x, w1, b1, w2, b2, activation, dtype)
    return torch.ops.route_kernels.feed_forward(x, w1, b1, w2, b2, activation, chunks, dtype)[0]


def check(x, w1, b1, w2, b2, activation, chunks, dtype) -> None:
    """The contract, for real and fake tensors alike; `dtype` is that of the products, None without autocast."""
    if x.dim() < 1:
        raise ValueError(f"{OP}: x: expected shape [..., C], got []")
    expect_shape(OP, "w1", w1, "F", ("C", x.shape[-1]))
    hidden = w1.shape[0]
    expect_shape(OP, "w2", w2, "O", ("F", hidden))
    if b1 is not None:
        expect_shape(OP, "b1", b1, ("F", hidden))
    if b2 is not None:
        expect_shape(OP, "b2", b2, ("O", w2.shape[0]))
    expect_dtypes(OP, dtype, x, w1=w1, b1=b1, w2=w2, b2=b2)
    expect_choice(OP, "activation", activation, ACTIVATIONS)
    if chunks < 1:
        raise ValueError(f"{OP}: chunks: expected a number >= 1, got {chunks}")
    expect_same_device(OP, ("x", x), w1=w1, b1=b1, w2=w2, b2=b2)


def _forward_parts(x, w1, b1, w2, b2, chunks, dtype):
    """[hidden], and what a cast needs: [x of a chunk], [w1], [b1], [w2], [b2]."""
    rows = rows_of_chunk(count_of_rows(x), chunks)
    parts = [((rows, w1.shape[0]), dtype)]
    if x.dtype != dtype:
        parts.append(((rows, x.shape[-1]), dtype))
    return parts + [(tuple(w.shape), dtype) for w in (w1, b1, w2, b2) if w is not None and w.dtype != dtype]


def _cast(parts: list[torch.Tensor], dtype: torch.dtype, x: torch.Tensor, *parameters: torch.Tensor | None):
    """The buffer that chunks of x are cast in (None: they need no cast) and the parameters in `dtype`."""
    rest = iter(parts)
    buffer = None if x.dtype == dtype else next(rest)
    return buffer, *(w if w is None or w.dtype == dtype else next(rest).copy_(w) for w in parameters)


def _kernel(x, w1, b1, w2, b2, activation, chunks, dtype):
    check(x, w1, b1, w2, b2, activation, chunks, dtype)
    output, workspace = _fake(x, w1, b1, w2, b2, activation, chunks, dtype)
    dtype = output.dtype
    hidden, *parts = parts_of(workspace, _forward_parts(x, w1, b1, w2, b2, chunks, dtype))
    buffer, w1, b1, w2, b2 = _cast(parts, dtype, x, w1, b1, w2, b2)
    size = max(hidden.shape[0], 1)
    for x_rows, output_rows in zip(rows_of(x).split(size), rows_of(output).split(size), strict=True):
        of_chunk = hidden[: x_rows.shape[0]]
        linear_into(of_chunk, in_dtype(x_rows, buffer), w1, b1)
        _FORWARD[activation](of_chunk, out=of_chunk)
        linear_into(output_rows, of_chunk, w2, b2)
    return output, workspace


def _fake(x, w1, b1, w2, b2, activation, chunks, dtype):
    check(x, w1, b1, w2, b2, activation, chunks, dtype)
    dtype = x.dtype if dtype is None else dtype
    output = x.new_empty(*x.shape[:-1], w2.shape[0], dtype=dtype)
    return output, new_workspace(_forward_parts(x, w1, b1, w2, b2, chunks, dtype), x)


def _backward_parts(x, w1, b1, w2, chunks, dtype):
    """[hidden before the activation], [after it, then its gradient], [sums and a product of each weight's gradient]."""
    sums = accumulate_dtype(dtype)
    weights = [(tuple(w.shape), sums) for w in (w1, w2) if w.dtype != sums]
    weights += [(tuple(w.shape), dtype) for w in (w1, w2) if dtype != sums]
    casts = _forward_parts(x, w1, b1, w2, None, chunks, dtype)
    return [casts[0], casts[0], *weights, *casts[1:]]


def _backward_kernel(grad_output, x, w1, b1, w2, b2, activation, chunks, dtype):
    parameters = (w1, b1, w2, b2)
    *grads, workspace = _backward_fake(grad_output, x, *parameters, activation, chunks, dtype)
    grad_x, grad_w1, *_ = grads
    dtype = grad_output.dtype
    sums = accumulate_dtype(dtype)
    hidden, activated, *parts = parts_of(workspace, _backward_parts(x, w1, b1, w2, chunks, dtype))
    total_w1, total_w2 = (
        grad if grad.dtype == sums else parts.pop(0) for grad in (grad_w1, grads[2 + (b1 is not None)])
    )
    product_w1, product_w2 = (None, None) if dtype == sums else (parts.pop(0), parts.pop(0))
    buffer, w1, b1, w2 = _cast(parts, dtype, x, w1, b1, w2)
    total_b1 = x.new_zeros(w1.shape[0], dtype=sums)
    if x.numel() == 0:
        workspace.zero_()
    size = max(hidden.shape[0], 1)
    every = (rows_of(grad_output), rows_of(x), rows_of(grad_x))
    for chunk, (grad_rows, x_rows, grad_x_rows) in enumerate(zip(*(rows.split(size) for rows in every), strict=True)):
        before, after = hidden[: x_rows.shape[0]], activated[: x_rows.shape[0]]
        x_rows = in_dtype(x_rows, buffer)
        linear_into(before, x_rows, w1, b1)
        kept = before if activation == "relu" else after  # its derivative needs no more than its output
        _FORWARD[activation](before, out=kept)
        add_product(total_w2, grad_rows, kept, product_w2, chunk == 0)
        torch.mm(grad_rows, w2, out=after)
        _activation_backward(activation, after, before)
        add_product(total_w1, after, x_rows, product_w1, chunk == 0)
        total_b1 += sum_of_rows(after)
        if buffer is None:
            torch.mm(after, w1, out=grad_x_rows)
        else:
            grad_x_rows.copy_(torch.mm(after, w1, out=buffer[: grad_x_rows.shape[0]]))
    totals = (total_w1, total_b1, total_w2, sum_of_rows(rows_of(grad_output)))
    wanted = [total for total, w in zip(totals, parameters, strict=True) if w is not None]
    for grad, total in zip(grads[1:], wanted, strict=True):
        if grad is not total:
            grad.copy_(total)
    return [*grads, workspace]


def _activation_backward(activation: str, grad: torch.Tensor, before: torch.Tensor) -> None:
    """grad *= activation'(before)."""
    if activation == "relu":
        _aten.threshold_backward.grad_input(grad, before, 0, grad_input=grad)
    elif activation == "gelu":
        _aten.gelu_backward.grad_input(grad, before, grad_input=grad)
    else:
        _aten.silu_backward.grad_input(grad, before, grad_input=grad)


def _backward_fake(grad_output, x, w1, b1, w2, b2, activation, chunks, dtype):
    grads = [tensor.new_empty(tensor.shape) for tensor in (x, w1, b1, w2, b2) if tensor is not None]
    return [*grads, new_workspace(_backward_parts(x, w1, b1, w2, chunks, grad_output.dtype), x)]


def _gradients(grads, given):
    found = iter(grads)
    return {name: None if given[name] is None else next(found) for name in ("x", "w1", "b1", "w2", "b2")}


_INPUTS = "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, SymInt chunks, ScalarType? dtype"

register(
    f"feed_forward({_INPUTS}) -> (Tensor output, Tensor workspace)",
    _kernel,
    _fake,
    Backward(
        f"feed_forward_backward(Tensor grad_output, {_INPUTS}) -> Tensor[]",
        _backward_kernel,
        _backward_fake,
        _gradients,
    ),
)


def _flop(x, w1, b1, w2, *_, **__) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w1) + math.prod(w2))


def _backward_flop(grad_output, x, w1, b1, w2, *_, **__) -> int:
    """The hidden layer again, then a gradient each of what the two products multiply."""
    return 2 * math.prod(x[:-1]) * (3 * math.prod(w1) + 2 * math.prod(w2))


count_flop(OP, _flop, _backward_flop)
