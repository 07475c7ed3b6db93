"""Costs of matching each prediction with each target of its image: the table that the Hungarian algorithm solves.

    cost_tgn = w_class class_tgn + w_l1 |box_gn - box_t|_1 - w_giou giou(box_gn, box_t)

    focal:    class = alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)),  p = sigmoid(logit of t's class)
    softmax:  class = -softmax(logits)[t's class]

B images, G branches, N predictions, K classes; T targets of all images, packed: those of an image stand side by side,
and nothing is padded to the fullest image. Deformable DETR and its successors (RT-DETR, D-FINE: their varifocal losses
too are matched by the focal cost) take "focal", DETR takes "softmax".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import backends
from ..precision import accumulate_dtype
from .contract import (
    expect_choice,
    expect_floating,
    expect_same_device,
    expect_shape,
    expect_tensors,
    integer,
    last_dim_contiguous,
    number,
)
from .flop import count_flop
from .registry import register

OP = "matching_cost"
CLASS_COSTS = ("focal", "softmax")


def matching_cost(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    true_boxes: torch.Tensor,
    labels: torch.Tensor,
    counts: Sequence[int],
    *,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    class_cost: str = "focal",
) -> torch.Tensor:
    """The cost of every prediction for every target of its own image; no gradient.

    Args:
        logits: [B, G, N, K], float16, bfloat16, float32 or float64.
        boxes: [B, G, N, 4] (cx, cy, w, h), likewise.
        true_boxes: [T, 4], likewise.
        labels: [T] int64, in [0, K).
        counts: B ints, the targets of each image; they sum to T.
        class_weight, l1_weight, giou_weight: of the three costs.
        alpha: weight of the positive class in the focal cost, 0 to 1.
        gamma: focusing parameter of the focal cost, >= 0.
        class_cost: "focal" or "softmax" (over all K).

    Returns:
        [T, G, N] float32 (float64 where logits or boxes are): image b is `.split(counts)[b]`. A cost that is not a
        finite number, and that of a label outside [0, K), is -inf: the cheapest of all, which no solver overlooks.

    Raises:
        ValueError: a shape, device, number of targets, weight or choice is wrong; the message names the argument.
        TypeError: a dtype is wrong.
        BackendUnavailableError: an explicitly requested backend cannot run.
    """
    expect_tensors(OP, logits=logits, boxes=boxes, true_boxes=true_boxes, labels=labels)
    expect_choice(OP, "class_cost", class_cost, CLASS_COSTS)
    if isinstance(counts, torch.Tensor) or not isinstance(counts, Sequence):
        raise TypeError(f"{OP}: counts: expected a sequence of ints, got {type(counts).__name__}")
    counts = [integer(OP, "counts", count) for count in counts]
    named = {"class_weight": class_weight, "l1_weight": l1_weight, "giou_weight": giou_weight}
    scalars = [number(OP, name, value) for name, value in (*named.items(), ("alpha", alpha), ("gamma", gamma))]
    chosen = backends.choose(OP, logits, boxes, true_boxes)
    check(logits, boxes, true_boxes, labels, counts, class_cost, scalars)
    logits, boxes, true_boxes = logits.detach(), boxes.detach(), true_boxes.detach()
    plain = backends.plain(OP, chosen)
    if plain is not None:
        return plain(logits, boxes, true_boxes, labels, counts, class_cost, scalars)
    return torch.ops.route_kernels.matching_cost(logits, boxes, true_boxes, labels, counts, class_cost, scalars, chosen)


def check(logits, boxes, true_boxes, labels, counts, class_cost, scalars) -> None:
    """The contract, for real and fake tensors alike."""
    expect_shape(OP, "logits", logits, "B", "G", "N", "K")
    batch, branches, queries, _ = logits.shape
    expect_shape(OP, "boxes", boxes, ("B", batch), ("G", branches), ("N", queries), ("", 4))
    expect_shape(OP, "labels", labels, "T")
    expect_shape(OP, "true_boxes", true_boxes, ("T", labels.shape[0]), ("", 4))
    for name, tensor in (("logits", logits), ("boxes", boxes), ("true_boxes", true_boxes)):
        expect_floating(OP, name, tensor)
    expect_floating(OP, "labels", labels, (torch.int64,))
    expect_same_device(OP, ("logits", logits), boxes=boxes, true_boxes=true_boxes, labels=labels)
    if len(counts) != batch:
        raise ValueError(f"{OP}: counts: expected {batch} ints, one an image, got {len(counts)}")
    for image, count in enumerate(counts):
        if count < 0:
            raise ValueError(f"{OP}: counts[{image}]: expected a number >= 0, got {count}")
    if sum(counts) != labels.shape[0]:
        raise ValueError(f"{OP}: counts: expected a sum of {labels.shape[0]} targets, got {sum(counts)}")
    for name, value in zip(("class_weight", "l1_weight", "giou_weight"), scalars, strict=False):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{OP}: {name}: expected a finite number, got {value}")
    *_, alpha, gamma = scalars
    if not 0 <= alpha <= 1:
        raise ValueError(f"{OP}: alpha: expected a number from 0 to 1, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"{OP}: gamma: expected a number >= 0, got {gamma}")


def _new_output(logits, boxes, true_boxes, labels, counts, class_cost, scalars, backend):
    check(logits, boxes, true_boxes, labels, counts, class_cost, scalars)
    dtype = accumulate_dtype(torch.promote_types(logits.dtype, boxes.dtype))
    return boxes.new_empty((labels.shape[0], *boxes.shape[1:3]), dtype=dtype)


def _kernel(logits, boxes, true_boxes, labels, counts, class_cost, scalars, backend):
    output = _new_output(logits, boxes, true_boxes, labels, counts, class_cost, scalars, backend)
    if output.numel():
        lse = logits.to(output.dtype).logsumexp(-1) if class_cost == "softmax" else None
        backends.kernel(OP, "forward", backend)(
            last_dim_contiguous(logits), lse, last_dim_contiguous(boxes), true_boxes.to(output.dtype).contiguous(),
            labels.contiguous(), list(counts), scalars, output,
        )  # fmt: skip
    return output


register(
    "matching_cost(Tensor logits, Tensor boxes, Tensor true_boxes, Tensor labels, SymInt[] counts, str class_cost, "
    "float[] scalars, str backend) -> Tensor",
    _kernel,
    _new_output,
)


def _flop(logits, boxes, true_boxes, labels, *_, **__) -> int:
    """Each cost takes two exponentials and logarithms' worth of class cost, 12 operations of L1 and 28 of GIoU."""
    return 60 * labels[0] * math.prod(logits[1:3])


count_flop(OP, _flop)
