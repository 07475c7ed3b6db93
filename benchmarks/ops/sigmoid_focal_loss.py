"""Benchmarks of `sigmoid_focal_loss`: the loss of a detector's logits against one-hot targets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from route_kernels.ops.sigmoid_focal_loss import kept_scale
from route_kernels.precision import FLOATING, accumulate_dtype
from route_kernels.testing import sigmoid_focal_loss_arguments

from ..contenders import rows_of_queries
from ..registry import Case, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, Sizes, Work, name_of

OP = "sigmoid_focal_loss"
TUNED = {"decoder": dict(batch=2, queries=900, classes=91), "encoder": dict(batch=2, queries=17821, classes=91)}
GPU_SECONDS = 6
MAKE = partial(sigmoid_focal_loss_arguments, classes=91)
CONTENDERS = (ours(OP), eager(OP, "eager, one-hot targets"))


def cases(device: str) -> list[Case]:
    return rows_of_queries(OP, MAKE, CONTENDERS, device)


def is_gpu_headline(case: Case) -> bool:
    return True


def least_work(s: Sizes, backward: bool, e: int, f: int) -> Work:
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["K"]
    return Work(
        memory_bytes=e * 2 * elements + (4 if backward else 12) * rows,
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=(1 if backward else 14) * elements,
        special_functions=0 if backward else 3 * elements,
    )


COUNTED = {OP: Counted(least_work, {"B": 2, "N": R50_POSITIONS, "K": 91})}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    return dict(zip("BNK", arguments["logits"].shape, strict=True))


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["logits"], arguments["logits"]


def kernel_calls() -> Iterator[KernelCall]:
    """Every dtype; one class, those of COCO and of LVIS; another gamma; without a gradient."""
    kinds = itertools.product(FLOATING, (1, 80, 91, 1203), (2.0,), (True,))
    for dtype, classes, gamma, differentiated in (*kinds, (torch.bfloat16, 91, 1.5, False)):
        logits = torch.empty(44446, classes, dtype=dtype, device="meta")
        targets = torch.empty(44446, dtype=torch.int64, device="meta")
        loss, grad = targets.to(accumulate_dtype(dtype)), logits if differentiated else None
        label, scale = f"{name_of(dtype)} K={classes} gamma={gamma}", kept_scale(dtype)
        yield KernelCall("forward", label, (logits, targets, 0.25, gamma, scale, loss, grad))
        if differentiated:
            yield KernelCall("backward", label, (loss, logits, 1 / scale, [logits]))
