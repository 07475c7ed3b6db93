"""Benchmarks of `matching_cost`: costs of predictions for the targets of their image against pairwise tables.

memory   e (B G N (K' + 4) + 4 T) + 4 T G N    K' logits of a prediction, the classes that its image has
special  4 T G N                               an exponential, a logarithm, two divisions
lanes    45 T G N
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from route_kernels.precision import FLOATING, accumulate_dtype
from route_kernels.testing import matching_cost_arguments

from ..contenders import DTYPES, compiled_eager
from ..registry import Case, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, Sizes, Work, name_of

OP = "matching_cost"
TUNED = {
    "decoder": dict(batch=2, branches=6, queries=900, classes=91, targets=100),
    "encoder": dict(batch=1, branches=1, queries=R50_POSITIONS, classes=1, targets=100),
}
GPU_SECONDS = 6
CONTENDERS = (ours(OP), eager(OP, "eager, pairwise tables"))
SIZES = {
    "decoder": dict(batch=4, branches=6, queries=900, classes=91),
    "proposals": dict(batch=4, branches=1, queries=R50_POSITIONS, classes=1),
}


def cases(device: str) -> list[Case]:
    if device == "cuda":
        sizes = SIZES["decoder"]
        return [
            Case(
                OP, f"decoder 100 boxes {suffix}", False,
                partial(matching_cost_arguments, targets=100, dtype=dtype, **sizes),
                (*CONTENDERS, compiled_eager(OP)), part=OP,
            )
            for dtype, suffix in DTYPES
        ]  # fmt: skip
    return [
        Case(
            OP, f"{name} {targets} boxes", False, partial(matching_cost_arguments, targets=targets, **sizes),
            CONTENDERS, quick=name == "decoder" and targets == 100,
        )
        for name, sizes in SIZES.items()
        for targets in (20, 100)
    ]  # fmt: skip


def is_gpu_headline(case: Case) -> bool:
    return True


def least_work(s: Sizes, backward: bool, e: int, f: int) -> Work:
    predictions = s["B"] * s["G"] * s["N"]
    costs = s["T"] * s["G"] * s["N"]
    per_image = -(-s["T"] // max(s["B"], 1))
    return Work(
        memory_bytes=e * (predictions * (min(s["K"], per_image) + 4) + 4 * s["T"]) + 8 * s["T"] + 4 * costs,
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=45 * costs,
        special_functions=4 * costs,
    )


COUNTED = {OP: Counted(least_work, {"B": 16, "G": 8, "N": 900, "K": 91, "T": 1600}, ("forward",))}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    return dict(zip("BGNK", arguments["logits"].shape, strict=True)) | {"T": len(arguments["labels"])}


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["logits"], arguments["boxes"]


def kernel_calls() -> Iterator[KernelCall]:
    """Every dtype with both class costs, and another gamma."""
    kinds = [*itertools.product(FLOATING, (False, True), (2.0,)), (torch.float32, False, 1.5)]
    for dtype, softmax, gamma in kinds:
        logits = torch.empty(16, 8, 900, 91, dtype=dtype, device="meta")
        boxes, wide = logits[..., :4].contiguous(), accumulate_dtype(dtype)
        true, labels = boxes.new_empty(1600, 4, dtype=wide), boxes.new_empty(1600, dtype=torch.int64)
        lse = boxes.new_empty(16, 8, 900, dtype=wide) if softmax else None
        output = boxes.new_empty(1600, 8, 900, dtype=wide)
        label = f"{name_of(dtype)} {'softmax' if softmax else 'focal'} gamma={gamma}"
        scalars = [2.0, 5.0, 2.0, 0.25, gamma]
        yield KernelCall("forward", label, (logits, lse, boxes, true, labels, [100] * 16, scalars, output))
