"""Benchmarks of `add_layer_norm`: the norm of a sum against PyTorch's sum and norm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from route_kernels.precision import FLOATING, accumulate_dtype
from route_kernels.testing import add_layer_norm_arguments

from ..contenders import rows_of_queries
from ..registry import Case, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, Sizes, Work, name_of

OP = "add_layer_norm"
TUNED = {"decoder": dict(batch=2, queries=900, channels=256), "encoder": dict(batch=2, queries=17821, channels=256)}
GPU_SECONDS = 6
MAKE = partial(add_layer_norm_arguments, channels=256)
CONTENDERS = (ours(OP), eager(OP, "sum and layer_norm"))


def cases(device: str) -> list[Case]:
    return rows_of_queries(OP, MAKE, CONTENDERS, device)


def is_gpu_headline(case: Case) -> bool:
    return True


def least_work(s: Sizes, backward: bool, e: int, f: int) -> Work:
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["C"]
    kept = rows * min(s["C"], 4)  # x^ of the spare channels
    return Work(
        memory_bytes=e * (3 * elements + kept) + 4 * rows + (2 + 2 * backward) * f * s["C"],
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=(13 if backward else 8) * elements,
        special_functions=0 if backward else rows,
    )


COUNTED = {OP: Counted(least_work, {"B": 2, "N": R50_POSITIONS, "C": 256})}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    return dict(zip("BNC", arguments["x"].shape, strict=True))


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["x"], arguments["weight"]


def kernel_calls() -> Iterator[KernelCall]:
    """Every dtype with the channels of detectors; x^ of four channels kept, and all of it."""
    for dtype, width, kept in (*itertools.product(FLOATING, (256, 384, 1024), (4,)), (torch.bfloat16, 256, 256)):
        tokens, accumulate = 44446, accumulate_dtype(dtype)
        x = torch.empty(tokens, width, dtype=dtype, device="meta")
        weight, rstd, normalized = x[0], x.new_empty(tokens, dtype=accumulate), x.new_empty(tokens, kept)
        channels, sums = x.new_empty(kept, dtype=torch.int32), x.new_empty(512, 2, width, dtype=accumulate)
        outputs, label = [x, rstd, normalized], f"{name_of(dtype)} C={width} kept={kept}"
        yield KernelCall("forward", label, (x, x, weight, weight, channels, 1e-5, outputs))
        yield KernelCall("backward", label, (x, outputs, channels, weight, weight, [x, sums]))
