"""Inputs of `matching_cost` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import Arguments, empty, random_boxes
from ..bad_inputs import bad_inputs, constant, no_integers, no_numbers, to, without_last


def arguments(
    *, batch: int = 2, branches: int = 2, queries: int = 9, classes: int = 7, targets: int = 3, gamma: float = 2.0,
    class_cost: str = "focal", dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Every second image has a target less, where there is more than one."""
    generator = torch.Generator().manual_seed(seed)
    counts = [max(targets - image % 2, min(targets, 1)) for image in range(batch)]
    logits = 2 * torch.randn(batch, branches, queries, classes, generator=generator, dtype=torch.float64) - 2
    boxes = random_boxes(batch, branches, queries, generator=generator)
    true_boxes = random_boxes(sum(counts), generator=generator)
    labels = torch.randint(classes, (sum(counts),), generator=generator)
    return {
        "logits": logits.to(device, dtype),
        "boxes": boxes.to(device, dtype),
        "true_boxes": true_boxes.to(device, dtype),
        "labels": labels.to(device),
        "counts": counts,
        "gamma": gamma,
        "class_cost": class_cost,
    }


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "focal": arguments(dtype=dtype, **sizes),
        "softmax": arguments(dtype=dtype, gamma=1.5, class_cost="softmax", **sizes),
        "gamma 1.5": arguments(dtype=dtype, gamma=1.5, **sizes) | {"alpha": 0.6, "l1_weight": 1.0, "giou_weight": 3.0},
    }


SHAPES = {  # around blocks of 256 predictions and vectors of 2 to 16 lanes
    "one of each": dict(batch=1, branches=1, queries=1, classes=1, targets=1),
    "one class": dict(queries=300, classes=1, targets=4),
    "7": dict(queries=31, classes=7, gamma=1.5),
    "256": dict(queries=256, targets=2),
    "257": dict(batch=3, branches=1, queries=257, classes=20),
    "1203": dict(batch=1, queries=5, classes=1203, targets=9),
    "more targets than predictions": dict(queries=3, targets=8),
    "softmax": dict(queries=33, classes=92, class_cost="softmax"),
}
PER_QUERY = {"logits": 2, "boxes": 2, "output": 2}
EMPTY = empty(arguments, "batch", "branches", "queries", "targets")
NUMBERS = {"class_weight": 1.5, "l1_weight": 3, "giou_weight": 0.5, "alpha": 0.75, "gamma": 3}
TINY = dict(batch=2, branches=1, queries=5, classes=4, targets=1)
DETECTOR = dict(batch=1, branches=2, classes=91, targets=20)
OF_WORKERS = dict(queries=3000, targets=20)
MANY = dict(batch=131_200, branches=1, queries=64, classes=256, targets=1)
MANY_GIGABYTES = 12
FLOAT32_UNDER_AUTOCAST = True
FLOP_OF_AN_ELEMENT = ("output", 60, 0)
BAD_INPUTS = bad_inputs(
    "matching_cost",
    arguments,
    *no_numbers("class_weight"),
    *no_numbers("l1_weight"),
    *no_numbers("giou_weight"),
    *no_numbers("alpha"),
    *no_numbers("gamma"),
    *no_integers("counts", lambda number: [3, number]),
    ("unknown", "class_cost", constant("varifocal"), ValueError, r"class_cost: expected one of focal, softmax, got 'v"),
    ("no tensor", "labels", constant([1]), TypeError, r"labels: expected a tensor, got list"),
    ("3 dimensions", "logits", lambda x: x[0], ValueError, r"logits: expected shape \[B, G, N, K\], got \[2, 9, 7\]"),
    (
        "other N",
        "boxes",
        without_last(2),
        ValueError,
        r"boxes: expected shape \[B=2, G=2, N=9, =?4\], got",
    ),
    ("3 numbers", "boxes", without_last(3), ValueError, r"boxes: expected shape .*, got \[2, 2, 9, 3\]"),
    ("other T", "true_boxes", without_last(0), ValueError, r"true_boxes: expected shape \[T=5, 4\], got \[4, 4\]"),
    ("padded", "labels", lambda x: x[None], ValueError, r"labels: expected shape \[T\], got \[1, 5\]"),
    ("integers", "logits", to(torch.int64), TypeError, r"logits: expected dtype .*, got torch.int64"),
    ("integers", "boxes", to(torch.int64), TypeError, r"boxes: expected dtype .*, got torch.int64"),
    ("integers", "true_boxes", to(torch.int64), TypeError, r"true_boxes: expected dtype .*, got torch.int64"),
    ("int32", "labels", to(torch.int32), TypeError, r"labels: expected dtype torch.int64, got torch.int32"),
    ("a number", "counts", constant(5), TypeError, r"counts: expected a sequence of ints, got int"),
    ("one image", "counts", constant([5]), ValueError, r"counts: expected 2 ints, one an image, got 1"),
    ("negative", "counts", constant([6, -1]), ValueError, r"counts\[1\]: expected a number >= 0, got -1"),
    ("other sum", "counts", constant([3, 3]), ValueError, r"counts: expected a sum of 5 targets, got 6"),
    ("above 1", "alpha", constant(1.5), ValueError, r"alpha: expected a number from 0 to 1, got 1.5"),
    ("negative", "gamma", constant(-2.0), ValueError, r"gamma: expected a number >= 0, got -2.0"),
    ("infinite", "l1_weight", constant(float("inf")), ValueError, r"l1_weight: expected a finite number, got inf"),
)
