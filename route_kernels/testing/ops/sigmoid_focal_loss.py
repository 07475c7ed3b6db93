"""Inputs of `sigmoid_focal_loss` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, no_numbers, to


def arguments(
    *, batch: int = 2, queries: int = 9, classes: int = 7, alpha: float = 0.25, gamma: float = 2.0,
    weighted: bool = False, reduction: str = "none", dtype: torch.dtype = torch.float32, device: str = "cpu",
    seed: int = 0,
) -> Arguments:  # fmt: skip
    """Logits as of a detector in training, most of them of low probability; a third of the queries have a target."""
    normal = normals(seed, device)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3 * classes, (batch, queries), generator=generator).clamp(max=classes)
    given: Arguments = {
        "logits": (2 * normal(batch, queries, classes, dtype=torch.float64).detach() - 2).to(dtype).requires_grad_(),
        "targets": targets.to(device),
        "alpha": alpha,
        "gamma": gamma,
        "reduction": reduction,
    }
    if weighted:
        given["weight"] = torch.rand(batch, 1, generator=generator).to(device)
    return given


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""
    return {
        "sum": arguments(dtype=dtype, reduction="sum", **sizes),
        "weights of images": arguments(dtype=dtype, gamma=1.5, alpha=0.6, weighted=True, **sizes),
    }


SHAPES = {  # around vectors of 2 to 16 lanes
    "one query": dict(batch=1, queries=1, classes=5),
    "one class": dict(queries=300, classes=1),
    "7": dict(queries=31, classes=7, gamma=1.5),
    "91": dict(queries=33, classes=91),
    "1203": dict(batch=1, queries=5, classes=1203),
    "weighted": dict(queries=17, classes=20, weighted=True, alpha=0.75),
    "cross entropy": dict(queries=17, classes=20, gamma=0.0, alpha=0.5),
}
SMALL_SHAPES = {  # around tiles of 128 elements
    "one query": dict(batch=1, queries=1, classes=5),
    "one class": dict(queries=70, classes=1),
    "several queries a tile": dict(queries=9, classes=7, gamma=1.5),
    "several tiles of classes": dict(batch=1, queries=3, classes=150),
    "weighted": dict(queries=3, classes=20, weighted=True, alpha=0.75, reduction="sum"),
    "cross entropy": dict(queries=3, classes=20, gamma=0.0, alpha=0.5),
}
GRADCHECK = tuple(dict(queries=5, weighted=True, alpha=0.3, gamma=gamma) for gamma in (0.0, 1.0, 2.0, 2.5))
PER_QUERY = {"logits": 1, "targets": 1, "output": 1}
EMPTY = empty(arguments, "batch", "queries")
EMPTY["classes"] = lambda: {
    name: argument.detach()[..., :0].requires_grad_() if name == "logits" else argument
    for name, argument in arguments(reduction="sum").items()
}
NUMBERS = {"alpha": 0.75, "gamma": 3}
TINY = dict(batch=2, queries=5, classes=4)
DETECTOR = dict(batch=1, classes=91)
OF_WORKERS = dict(queries=1000)
MANY = dict(batch=131_200, queries=64, classes=256)
MANY_GIGABYTES = 20
FLOAT32_UNDER_AUTOCAST = True
FLOP_OF_AN_ELEMENT = ("logits", 17, 1)
BAD_INPUTS = bad_inputs(
    "sigmoid_focal_loss",
    lambda: arguments(weighted=True),
    *no_numbers("alpha"),
    *no_numbers("gamma"),
    ("none", "reduction", constant(None), ValueError, r"reduction: expected one of sum, none, got None"),
    ("no tensor", "targets", constant([1]), TypeError, r"targets: expected a tensor, got list"),
    ("1 dimension", "logits", lambda x: x[0, 0], ValueError, r"logits: expected shape \[..., N, K\], got \[7\]"),
    ("one-hot", "targets", lambda t: t[..., None].expand(-1, -1, 7), ValueError, r"targets: expected shape \[2, 9\],"),
    ("integers", "logits", to(torch.int64), TypeError, r"logits: expected dtype .*, got torch.int64"),
    ("int32", "targets", to(torch.int32), TypeError, r"targets: expected dtype torch.int64, got torch.int32"),
    ("above 1", "alpha", constant(1.5), ValueError, r"alpha: expected a number from 0 to 1, got 1.5"),
    ("negative", "gamma", constant(-2.0), ValueError, r"gamma: expected a number >= 0, got -2.0"),
    ("other B", "weight", lambda w: w.expand(2, 8), ValueError, r"weight: expected a shape broadcastable to \[2, 9\]"),
    ("integers", "weight", to(torch.int64), TypeError, r"weight: expected dtype .*, got torch.int64"),
    ("unknown", "reduction", constant("mean"), ValueError, r"reduction: expected one of sum, none, got 'mean'"),
)
