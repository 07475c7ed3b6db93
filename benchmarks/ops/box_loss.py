"""Benchmarks of `box_loss`: losses of matched boxes against gathered pairs.

forward   memory 12 B N + 4 e B N, and 16 bytes of a target; lanes 50 B N, special 2 B N
backward  memory 8 B N + 8 e B N and targets;                lanes 110 B N, special 6 B N
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from route_kernels.precision import FLOATING, accumulate_dtype
from route_kernels.testing import box_loss_arguments

from ..contenders import DTYPES, compiled_eager
from ..registry import Case, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, Sizes, Work, name_of

OP = "box_loss"
TUNED = {"decoder": dict(batch=96, queries=900, targets=1600), "encoder": dict(batch=16, queries=22223, targets=1600)}
GPU_SECONDS = 6
CONTENDERS = (ours(OP), eager(OP, "eager, gathered pairs"))


def cases(device: str) -> list[Case]:
    if device == "cuda":
        return [
            Case(
                OP, f"B 96 N 900 {suffix}", True,
                partial(box_loss_arguments, batch=96, queries=900, targets=1600, dtype=dtype),
                (*CONTENDERS, compiled_eager(OP)), part=OP,
            )
            for dtype, suffix in DTYPES
        ]  # fmt: skip
    return [
        Case(
            OP, f"B {batch} N {queries}", True, partial(box_loss_arguments, batch=batch, queries=queries, targets=100),
            CONTENDERS, quick=queries == 900,
        )
        for batch, queries in ((24, 900), (1, R50_POSITIONS))
    ]  # fmt: skip


def is_gpu_headline(case: Case) -> bool:
    return True


def least_work(s: Sizes, backward: bool, e: int, f: int) -> Work:
    boxes = s["B"] * s["N"]
    return Work(
        memory_bytes=(16 + (8 if backward else 4) * e) * boxes + 4 * e * s["T"],
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=(110 if backward else 50) * boxes,
        special_functions=(6 if backward else 2) * boxes,
    )


COUNTED = {OP: Counted(least_work, {"B": 96, "N": 900, "T": 1600})}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    *batch, queries = arguments["target"].shape
    return {"B": torch.Size(batch).numel(), "N": queries, "T": len(arguments["true_boxes"])}


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["boxes"], arguments["true_boxes"]


def kernel_calls() -> Iterator[KernelCall]:
    """Every dtype."""
    for dtype in FLOATING:
        boxes, wide = torch.empty(86400, 4, dtype=dtype, device="meta"), accumulate_dtype(dtype)
        true, losses = boxes.new_empty(1600, 4, dtype=wide), boxes.new_empty(86400, 2, dtype=wide)
        target = boxes.new_empty(86400, dtype=torch.int64)
        yield KernelCall("forward", name_of(dtype), (boxes, true, target, [5.0, 2.0], losses))
        yield KernelCall("backward", name_of(dtype), (losses, boxes, true, target, [5.0, 2.0], [boxes]))
