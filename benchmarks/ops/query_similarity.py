"""Benchmarks of `query_similarity`: similarities against an N x N matrix that is written out.

query_similarity, "relu": each unordered pair once; "mean": sums only

    relu      memory   e (B N C + B N)
              matrix   B N (N - 1) C                  x_i . x_j, i < j
              special  B N                            1 / |x|
              lanes    3 B N (N - 1) / 2 + 2 B N C    relu, its share of s_i and of s_j; |x|^2 and x / |x|
    mean      forward  memory e (B N C + B N), special B N, lanes 3 B N C: |x|^2, sum_j x^_j, x^_i . sum
              backward memory e (2 B N C + B N), special B N, lanes 7 B N C: these again, sum_j g_j x^_j, g_i sum + it,
                       - 2 g_i x^_i, projection off x^_i (2)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from route_kernels.precision import FLOATING
from route_kernels.testing import EAGER, query_similarity_arguments

from ..contenders import compiled_eager
from ..registry import Case, Contender, ours
from ..work import Counted, KernelCall, Sizes, Work, name_of

OP = "query_similarity"
TUNED = {
    f"B {batch} N {queries}": dict(batch=batch, queries=queries, channels=256)
    for batch, queries in ((2, 300), (16, 1100))
}
GPU_SECONDS = 10
MAKE = partial(query_similarity_arguments, channels=256)


def written_out(x: Tensor, mode: str) -> Tensor:
    unit = F.normalize(x, dim=-1)
    cosines = (unit @ unit.mT).relu_()
    cosines.diagonal(dim1=1, dim2=2).zero_()
    return cosines.mean(dim=-1)


def cases(device: str) -> list[Case]:
    contenders = (ours(OP), Contender("eager, N x N written out", written_out, EAGER[OP]))
    if device == "cuda":
        make = partial(MAKE, batch=16, queries=1100, dtype=torch.bfloat16)
        return [Case(OP, "B 16 N 1100 bf16", False, make, (*contenders, compiled_eager(OP)), part=OP)]
    return [
        Case(
            OP, f"B {batch} N {queries}", False, partial(MAKE, batch=batch, queries=queries), contenders,
            quick=queries == 300,
        )
        for batch, queries in ((2, 300), (2, 900), (1, 2048))
    ]  # fmt: skip


def is_gpu_headline(case: Case) -> bool:
    return True


def _similarity_relu(s: Sizes, backward: bool, e: int, f: int) -> Work:
    if backward:
        raise ValueError("query_similarity: mode relu has no backward")
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["C"]
    return Work(
        memory_bytes=e * (elements + rows),
        l1_bytes=0,
        matrix_flop=elements * (s["N"] - 1),
        lane_operations=3 * rows * (s["N"] - 1) // 2 + 2 * elements,
        special_functions=rows,
    )


def _similarity_mean(s: Sizes, backward: bool, e: int, f: int) -> Work:
    rows, elements = s["B"] * s["N"], s["B"] * s["N"] * s["C"]
    return Work(
        memory_bytes=e * ((2 if backward else 1) * elements + rows),
        l1_bytes=0,
        matrix_flop=0,
        lane_operations=(7 if backward else 3) * elements,
        special_functions=rows,
    )


COUNTED = {
    OP: Counted(_similarity_relu, {"B": 16, "N": 1100, "C": 256}, ("forward",)),
    f"{OP} mean": Counted(_similarity_mean, {"B": 16, "N": 1100, "C": 256}),
}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    return dict(zip("BNC", arguments["x"].shape, strict=True))


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["x"], arguments["x"]


def kernel_calls() -> Iterator[KernelCall]:
    """C of one and of several chunks, aligned and not, every dtype."""
    for dtype in FLOATING[:3]:
        for channels in (32, 250, 256, 1024):
            x = torch.empty(2, 1100, channels, dtype=dtype, device="meta")
            yield KernelCall("forward", f"{name_of(dtype)} C={channels}", (x, x.new_empty(2, 1100)))
