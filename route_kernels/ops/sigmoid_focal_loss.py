"""Sigmoid focal loss of class indices (arXiv 1708.02002, equation 5): no one-hot targets, no float32 copies.

    z_nk = -logit_nk if k is the target of n, else logit_nk          q = sigmoid(z) = 1 - p_t
    loss_n = sum_k alpha_t q^gamma softplus(z)
    d loss_n / d z_nk = alpha_t q^gamma (gamma (1 - q) softplus(z) + q)

N queries, K classes; alpha_t is alpha for the target and 1 - alpha for the others. The gradient is written in the
forward pass, in the dtype of the logits, and is all that is kept; backward multiplies it by the gradient of its query.
"""

from __future__ import annotations

import math

import torch

from .. import backends
from ..precision import accumulate_dtype
from .contract import (
    as_rows,
    expect_choice,
    expect_floating,
    expect_same_device,
    expect_tensors,
    may_be_differentiated,
    number,
)
from .flop import count_flop
from .registry import Backward, register

OP = "sigmoid_focal_loss"
REDUCTIONS = ("sum", "none")
FLOAT16_SCALE = 4096.0
"""Scales the kept gradient in float16: it is at most about 1 + gamma / e, and often below the smallest float16."""


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
    plain = backends.plain(OP, chosen)
    if plain is not None:
        loss = plain(logits, targets, alpha, gamma)
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


def kept_scale(dtype: torch.dtype) -> float:
    """The factor that the kept gradient is multiplied by."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def _source(logits: torch.Tensor) -> torch.Tensor:
    """No element, and a history: backward, which needs no logits, still shows autograd that it depends on them.

    Without it a second derivative would be 0 in silence.
    """
    return logits.narrow(0, 0, 0).clone()  # a view would keep the logits


def _new_outputs(logits, targets, alpha, gamma, source, backend):
    check(logits, targets, alpha, gamma)
    loss = logits.new_empty(logits.shape[:-1], dtype=accumulate_dtype(logits.dtype))
    return loss, logits.new_empty((0,) if source is None else logits.shape)


def _kernel(logits, targets, alpha, gamma, source, backend):
    loss, grad = outputs = _new_outputs(logits, targets, alpha, gamma, source, backend)
    if logits.numel() == 0:
        loss.zero_()
        return outputs
    backends.kernel(OP, "forward", backend)(
        as_rows(logits), targets.reshape(-1).contiguous(), alpha, gamma, kept_scale(logits.dtype), loss.view(-1),
        None if source is None else grad.view(-1, logits.shape[-1]),
    )  # fmt: skip
    return outputs


def _new_grad(grad_output, grad, *others):
    return grad.new_empty(grad.shape)


def _backward_kernel(grad_output, grad, source, backend):
    grad_logits = _new_grad(grad_output, grad)
    if grad.numel():
        run = backends.kernel(OP, "backward", backend)
        run(
            grad_output.reshape(-1).contiguous(),
            as_rows(grad),
            1 / kept_scale(grad.dtype),
            [as_rows(grad_logits)],
        )
    return grad_logits


register(
    "sigmoid_focal_loss(Tensor logits, Tensor targets, float alpha, float gamma, Tensor? source, str backend) "
    "-> (Tensor loss, Tensor grad)",
    _kernel,
    _new_outputs,
    Backward(
        "sigmoid_focal_loss_backward(Tensor grad_output, Tensor grad, Tensor? source, str backend) -> Tensor",
        _backward_kernel,
        _new_grad,
        lambda grad_logits, _: {"logits": grad_logits},
    ),
)


def _flop(logits, *_, **__) -> int:
    """A logit has an exponential, a logarithm and a power, and 14 operations around them; its gradient comes along."""
    return 17 * math.prod(logits)


def _backward_flop(grad_output, grad, *_, **__) -> int:
    return math.prod(grad)


count_flop(OP, _flop, _backward_flop)
