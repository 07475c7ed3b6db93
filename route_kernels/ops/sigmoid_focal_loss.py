"""Sigmoid focal loss of class indices (arXiv 1708.02002, equation 5): no one-hot targets, no float32 copies.

    z_nk = -logit_nk if k is the target of n, else logit_nk          q = sigmoid(z) = 1 - p_t
    loss_n = sum_k alpha_t q^gamma softplus(z)
    d loss_n / d z_nk = alpha_t q^gamma (gamma (1 - q) softplus(z) + q)

N queries, K classes; alpha_t is alpha for the target and 1 - alpha for the others. The gradient is written in the
forward pass, in the dtype of the logits, and is all that is kept; backward multiplies it by the gradient of its query.
"""

from __future__ import annotations

import torch

from .. import backends
from ..reference.precision import accumulate_dtype
from .contract import (
    expect_choice,
    expect_floating,
    expect_same_device,
    expect_tensors,
    last_dim_contiguous,
    may_be_differentiated,
    number,
)
from .registry import register, register_backward

OP = "sigmoid_focal_loss"
REDUCTIONS = ("sum", "none")
FLOAT16_SCALE = 4096.0
"""Of the kept gradient in float16: it is at most about 1 + gamma / e, and often below the smallest float16."""


def sigmoid_focal_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: torch.Tensor | None = None,
    *,
    reduction: str = "sum",
) -> torch.Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t, summed over all classes, and over all queries or not.

    Args:
        logits: [..., N, K], float16, bfloat16, float32 or float64.
        targets: [..., N] int64, the class of each query; K, or any number outside [0, K), is background.
        alpha: weight of the positive class, 0 to 1.
        gamma: focusing parameter, >= 0.
        weight: broadcastable to [..., N], factor of each query's loss; None is 1.
        reduction: "sum" over everything, or "none": the losses of the queries [..., N].

    Returns:
        float32 (float64 for float64): a scalar, or [..., N]. The caller divides by the number of boxes.

    Raises:
        ValueError: a shape, device, alpha, gamma or reduction is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        BackendUnavailableError: an explicitly requested backend cannot run.
        RuntimeError: a second derivative was asked of a fused kernel.
    """
    expect_tensors(OP, logits=logits, targets=targets, **({} if weight is None else {"weight": weight}))
    expect_choice(OP, "reduction", reduction, REDUCTIONS)
    alpha, gamma = number(OP, "alpha", alpha), number(OP, "gamma", gamma)
    chosen = backends.choose(OP, logits)
    check(logits, targets, alpha, gamma)
    if weight is not None:
        _check_weight(weight, targets)
    if chosen in backends.PLAIN:
        loss = backends.PLAIN[chosen].sigmoid_focal_loss(logits, targets, alpha, gamma)
    else:
        source = _source(logits) if may_be_differentiated(logits) else None
        loss, _ = torch.ops.route_kernels.sigmoid_focal_loss(logits, targets, alpha, gamma, source, chosen)
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    return loss.sum() if reduction == "sum" else loss


def check(logits, targets, alpha, gamma) -> None:
    """The contract, for real and fake tensors alike."""
    if logits.dim() < 2:
        raise ValueError(f"{OP}: logits: expected shape [..., N, K], got {list(logits.shape)}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"{OP}: targets: expected shape {list(logits.shape[:-1])}, got {list(targets.shape)}")
    expect_floating(OP, "logits", logits)
    expect_floating(OP, "targets", targets, (torch.int64,))
    if not 0 <= alpha <= 1:
        raise ValueError(f"{OP}: alpha: expected a number from 0 to 1, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"{OP}: gamma: expected a number >= 0, got {gamma}")
    expect_same_device(OP, ("logits", logits), targets=targets)


def _check_weight(weight: torch.Tensor, targets: torch.Tensor) -> None:
    expect_floating(OP, "weight", weight)
    expect_same_device(OP, ("targets", targets), weight=weight)
    sizes = zip(reversed(weight.shape), reversed(targets.shape), strict=False)
    if weight.dim() > targets.dim() or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"{OP}: weight: expected a shape broadcastable to {list(targets.shape)}, got {list(weight.shape)}"
        )


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """[..., N, K] -> [T, K], each row contiguous; a copy only where the strides leave no other way."""
    return last_dim_contiguous(logits).reshape(-1, logits.shape[-1])


def kept_scale(dtype: torch.dtype) -> float:
    """What the kept gradient is multiplied by."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def _source(logits: torch.Tensor) -> torch.Tensor:
    """No element, and a history: backward, which needs no logits, still shows autograd that it depends on them.

    Without it a second derivative would be 0 in silence.
    """
    return logits.narrow(0, 0, 0).clone()  # a view would keep the logits


def _new_outputs(logits: torch.Tensor, source: torch.Tensor | None):
    loss = logits.new_empty(logits.shape[:-1], dtype=accumulate_dtype(logits.dtype))
    return loss, logits.new_empty((0,) if source is None else logits.shape)


def _kernel(logits, targets, alpha, gamma, source, backend):
    check(logits, targets, alpha, gamma)
    loss, grad = _new_outputs(logits, source)
    if logits.numel() == 0:
        return loss.zero_(), grad
    _FORWARD[backends.resolve(OP, backend, logits)](
        _rows(logits), targets.reshape(-1).contiguous(), alpha, gamma, kept_scale(logits.dtype), loss.view(-1),
        None if source is None else grad.view(-1, logits.shape[-1]),
    )  # fmt: skip
    return loss, grad


def _fake(logits, targets, alpha, gamma, source, backend):
    check(logits, targets, alpha, gamma)
    return _new_outputs(logits, source)


def _backward_kernel(grad_loss, grad, source, backend):
    grad_logits = grad.new_empty(grad.shape)
    if grad.numel():
        _BACKWARD[backends.resolve(OP, backend, grad)](
            grad_loss.reshape(-1).contiguous(), _rows(grad), 1 / kept_scale(grad.dtype), _rows(grad_logits)
        )
    return grad_logits


def _backward_fake(grad_loss, grad, source, backend):
    return grad.new_empty(grad.shape)


def _cpu_forward(*arguments):
    torch.ops.route_kernels_native.sigmoid_focal_loss_forward(*arguments)


def _cpu_backward(*arguments):
    torch.ops.route_kernels_native.sigmoid_focal_loss_backward(*arguments)


def _triton_forward(*arguments):
    from ..triton.sigmoid_focal_loss import forward

    forward(*arguments)


def _triton_backward(*arguments):
    from ..triton.sigmoid_focal_loss import backward

    backward(*arguments)


_FORWARD = {"cpu": _cpu_forward, "triton": _triton_forward}
_BACKWARD = {"cpu": _cpu_backward, "triton": _triton_backward}


def _setup_context(ctx, inputs, output):
    *_, source, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(output[1], source)


def _backward(ctx, grad_loss, _grad_of_grad):
    if grad_loss is None:
        return (None,) * 6
    grad_logits = torch.ops.route_kernels.sigmoid_focal_loss_backward(grad_loss, *ctx.saved_tensors, ctx.backend)
    return grad_logits, None, None, None, None, None


register(
    "sigmoid_focal_loss(Tensor logits, Tensor targets, float alpha, float gamma, Tensor? source, str? backend) "
    "-> (Tensor loss, Tensor grad)",
    _kernel,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
register_backward(
    OP,
    "sigmoid_focal_loss_backward(Tensor grad_loss, Tensor grad, Tensor? source, str? backend) -> Tensor",
    _backward_kernel,
    _backward_fake,
)
