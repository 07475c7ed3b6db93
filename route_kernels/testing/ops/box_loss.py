"""Inputs of `box_loss` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import Arguments, empty, random_boxes
from ..bad_inputs import bad_inputs, constant, no_numbers, to, without_last


def arguments(
    *, batch: int = 2, queries: int = 9, targets: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu",
    seed: int = 0,
) -> Arguments:  # fmt: skip
    """Half of the queries have a target."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(batch, queries, generator=generator)
    true_boxes = random_boxes(targets, generator=generator)
    target = torch.randint(-max(targets, 1), max(targets, 1), (batch, queries), generator=generator).clamp_min(-1)
    return {
        "boxes": boxes.to(device, dtype).requires_grad_(),
        "true_boxes": true_boxes.to(device, dtype),
        "target": target.to(device),
    }


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "default weights": arguments(dtype=dtype, **sizes),
        "weighted": arguments(dtype=dtype, **sizes) | {"l1_weight": 1.5, "giou_weight": 0.5},
    }


SHAPES = {
    "one": dict(batch=1, queries=1, targets=1),
    "one target": dict(queries=33, targets=1),
    "more targets than boxes": dict(batch=1, queries=7, targets=50),
    "several workers": dict(batch=3, queries=5000, targets=20),
}
GRADCHECK = (dict(),)
PER_QUERY = {"boxes": 1, "target": 1, "output": 1}
EMPTY = empty(arguments, "batch", "queries", "targets")
NUMBERS = {"l1_weight": 3, "giou_weight": 0.5}
TINY = dict(batch=2, queries=5, targets=4)
DETECTOR = dict(batch=1, targets=20)
OF_WORKERS = dict(queries=9000)
MANY = dict(batch=131_200, queries=4096, targets=20)
MANY_GIGABYTES = 40
FLOAT32_UNDER_AUTOCAST = True
FLOP_OF_AN_ELEMENT = ("boxes", 12, 28)
BAD_INPUTS = bad_inputs(
    "box_loss",
    arguments,
    *no_numbers("l1_weight"),
    *no_numbers("giou_weight"),
    ("no tensor", "target", constant([1]), TypeError, r"target: expected a tensor, got list"),
    ("1 dimension", "boxes", lambda x: x[0, 0], ValueError, r"boxes: expected shape \[..., N, 4\], got \[4\]"),
    ("3 numbers", "boxes", without_last(2), ValueError, r"boxes: expected shape \[..., N, 4\], got \[2, 9, 3\]"),
    ("5 numbers", "true_boxes", lambda x: x[:, :3], ValueError, r"true_boxes: expected shape \[T, 4\], got \[5, 3\]"),
    ("other N", "target", without_last(1), ValueError, r"target: expected shape \[2, 9\], got \[2, 8\]"),
    ("integers", "boxes", to(torch.int64), TypeError, r"boxes: expected dtype .*, got torch.int64"),
    ("integers", "true_boxes", to(torch.int64), TypeError, r"true_boxes: expected dtype .*, got torch.int64"),
    ("int32", "target", to(torch.int32), TypeError, r"target: expected dtype torch.int64, got torch.int32"),
    (
        "not a number",
        "giou_weight",
        constant(float("nan")),
        ValueError,
        r"giou_weight: expected a finite number, got nan",
    ),
    (
        "with gradient",
        "true_boxes",
        lambda x: x.clone().requires_grad_(),
        TypeError,
        r"true_boxes: expected no gradient, got a tensor that requires one",
    ),
)
