"""L1 and GIoU loss of predicted boxes for the true ones that they are matched with, and their gradient, in one pass.

    loss_n = (w_l1 |box_n - box_t|_1,  w_giou (1 - giou(box_n, box_t))),  t = target_n;  (0, 0) where n has none

N predictions, T true boxes. Nothing is gathered: a prediction says which true box is its own. Backward computes the
terms again from the boxes; nothing else is kept.
"""

from __future__ import annotations

import math

import torch

from .. import backends
from ..precision import accumulate_dtype
from .contract import (
    as_rows,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    number,
)
from .flop import count_flop
from .registry import Backward, register

OP = "box_loss"


def box_loss(
    boxes: torch.Tensor,
    true_boxes: torch.Tensor,
    target: torch.Tensor,
    *,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> torch.Tensor:
    """Weighted L1 and GIoU loss of each box.

    Args:
        boxes: [..., N, 4] (cx, cy, w, h), float16, bfloat16, float32 or float64.
        true_boxes: [T, 4], likewise; without gradient.
        target: [..., N] int64, which true box is each prediction's; -1, or any number outside [0, T), is none.
        l1_weight, giou_weight: of the two losses.

    Returns:
        [..., N, 2] float32 (float64 for float64): (L1, GIoU), 0 without a target.

    Raises:
        ValueError: a shape, device or weight is wrong; the message names the argument.
        TypeError: a dtype is wrong, or true_boxes ask for a gradient.
        BackendUnavailableError: an explicitly requested backend cannot run.
        RuntimeError: a second derivative was asked of a fused kernel.
    """
    expect_tensors(OP, boxes=boxes, true_boxes=true_boxes, target=target)
    weights = [number(OP, "l1_weight", l1_weight), number(OP, "giou_weight", giou_weight)]
    chosen = backends.choose(OP, boxes, true_boxes)
    check(boxes, true_boxes, target, weights)
    if true_boxes.requires_grad:
        raise TypeError(f"{OP}: true_boxes: expected no gradient, got a tensor that requires one; detach it")
    plain = backends.plain(OP, chosen)
    if plain is not None:
        return plain(boxes, true_boxes, target, weights)
    return torch.ops.route_kernels.box_loss(boxes, true_boxes, target, weights, chosen)


def check(boxes, true_boxes, target, weights) -> None:
    """The contract, for real and fake tensors alike."""
    if boxes.dim() < 2 or boxes.shape[-1] != 4:
        raise ValueError(f"{OP}: boxes: expected shape [..., N, 4], got {list(boxes.shape)}")
    expect_shape(OP, "true_boxes", true_boxes, "T", ("", 4))
    if target.shape != boxes.shape[:-1]:
        raise ValueError(f"{OP}: target: expected shape {list(boxes.shape[:-1])}, got {list(target.shape)}")
    expect_floating(OP, "boxes", boxes)
    expect_floating(OP, "true_boxes", true_boxes)
    expect_floating(OP, "target", target, (torch.int64,))
    expect_same_device(OP, ("boxes", boxes), true_boxes=true_boxes, target=target)
    for name, value in zip(("l1_weight", "giou_weight"), weights, strict=True):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{OP}: {name}: expected a finite number, got {value}")


def _inputs(boxes, true_boxes, target):
    """Arguments of the kernels: [M, 4], [T, 4] in the accumulate type, [M]."""
    dtype = accumulate_dtype(boxes.dtype)
    return as_rows(boxes), true_boxes.to(dtype).contiguous(), target.reshape(-1).contiguous()


def _new_output(boxes, true_boxes, target, weights, backend):
    check(boxes, true_boxes, target, weights)
    return boxes.new_empty((*boxes.shape[:-1], 2), dtype=accumulate_dtype(boxes.dtype))


def _kernel(boxes, true_boxes, target, weights, backend):
    output = _new_output(boxes, true_boxes, target, weights, backend)
    if output.numel():
        backends.kernel(OP, "forward", backend)(*_inputs(boxes, true_boxes, target), weights, output.view(-1, 2))
    return output


def _new_grad(grad_output, boxes, *others):
    return boxes.new_empty(boxes.shape)


def _backward_kernel(grad_output, boxes, true_boxes, target, weights, backend):
    grad = _new_grad(grad_output, boxes)
    if grad.numel():
        rows = grad_output.reshape(-1, 2).contiguous()
        inputs = _inputs(boxes, true_boxes, target)
        backends.kernel(OP, "backward", backend)(rows, *inputs, weights, [grad.view(-1, 4)])
    return grad


register(
    "box_loss(Tensor boxes, Tensor true_boxes, Tensor target, float[] weights, str backend) -> Tensor",
    _kernel,
    _new_output,
    Backward(
        "box_loss_backward(Tensor grad_output, Tensor boxes, Tensor true_boxes, Tensor target, float[] weights, "
        "str backend) -> Tensor",
        _backward_kernel,
        _new_grad,
        lambda grad_boxes, _: {"boxes": grad_boxes},
    ),
)


def _flop(boxes, *_, **__) -> int:
    """For a coordinate, 2 operations of L1 and 10 of GIoU; 16 where the gradient is taken as well."""
    return 12 * math.prod(boxes)


def _backward_flop(grad_output, boxes, *_, **__) -> int:
    return 28 * math.prod(boxes)


count_flop(OP, _flop, _backward_flop)
