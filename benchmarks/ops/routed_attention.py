"""Benchmarks of `routed_attention`: a decoder's, against plain SDPA, public code and FlexAttention.

routed_attention, with B N M pairs of a query and a key and H heads

    forward   memory   e (2 B H N D + 2 B H M D) + 4 B H N + f B (N + M)(2 R + G)   q, O; k, v; lse; six factors
              matrix   2 B N M (2 H D + 2 R + G)      q k and P v of every head; sup, del and gate once for all heads
              special  B N M (H + 1) + 2 B H N        exp(S - max) of every head, p = 0.5 + 0.5 tanh(g / 2) once;
                                                      log and reciprocal of the row sums
              lanes    B N M (5 + 4 H)                p; sup - del; r; two of the clamp | scale q k + b, max,
                                                      S - max, row sum of every head
    backward  memory   e (4 B H N D + 4 B H M D) + 4 B H N + 2 f B (N + M)(2 R + G)
                       q, O, dO, dQ; k, v, dK, dV; lse; factors and their gradients
              matrix   2 B N M (5 H D + 6 R + 3 G)    S, dP, dV, dK, dQ; each product again and its two gradients
              special  B N M (H + 1)                  P and p again, nothing else
              lanes    B N M (10 + 5 H) + B H N D     p, sup - del, r; |r| <= limit, select; dr p, dr - dr p,
                                                      (1 - p) p dr, times sup - del; -lse + b
                                                      | S, S - lse, dP - T, P times it, sum over heads; T = dO . O
    Two passes over the tiles, one by queries and one by keys, take 7 H D instead of 5 H D and both exponentials twice.

R = G = 0 is attention without a bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from route_kernels.precision import FLOATING
from route_kernels.testing import Arguments, routed_attention_arguments

from ..contenders import (
    COMPILED_PUBLIC,
    FLASH_BIAS,
    FLEX_FACTORED,
    FLEX_LOOKED_UP,
    PLAIN_SDPA,
    PUBLIC,
    TRIANGLE,
)
from ..registry import MIB, Case, Target, eager, ours, without_gradients
from ..work import Counted, KernelCall, Sizes, Work, name_of

OP = "routed_attention"
DECODER = {"heads": 8, "channels": 32, "rank": 16, "gate_rank": 3}
TUNED = {
    f"B {batch} N {queries}": dict(batch=batch, queries=queries, limit=5.0, **DECODER)
    for batch, queries in ((2, 300), (16, 1100))
}
GPU_SECONDS = 60
ROUTED_ATTENTION = ours(OP)
EAGER_ROUTING = eager(OP, "eager, bias written out")
CONTENDERS = (ROUTED_ATTENTION, PUBLIC, EAGER_ROUTING, PLAIN_SDPA, FLASH_BIAS, TRIANGLE)


def attention_arguments(batch: int, queries: int, dtype: torch.dtype = torch.float32) -> Arguments:
    """The arguments of the speed and the memory rows: H 8, D 32, R 16, G 3."""
    return routed_attention_arguments(batch=batch, queries=queries, dtype=dtype, **DECODER)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        rows = ((2, 300, None), (2, 900, 1.2), (2, 1100, None), (1, 2048, 1.0))
        compilers = (COMPILED_PUBLIC, FLEX_LOOKED_UP)
        return [
            Case(
                OP,
                f"B {batch} N {queries}",
                True,
                partial(attention_arguments, batch, queries),
                (*CONTENDERS, *compilers) if queries == 900 else CONTENDERS,
                [] if at_most is None else [Target(PLAIN_SDPA.name, at_most)],
                quick=queries == 300,
            )
            for batch, queries, at_most in rows
        ]
    with_compiler = (*CONTENDERS, COMPILED_PUBLIC)  # in one case: compiling is what takes long
    flex = (ROUTED_ATTENTION, FLEX_FACTORED, FLEX_LOOKED_UP)
    bf16 = torch.bfloat16
    headline, decoder = partial(attention_arguments, 16, 1100, bf16), partial(attention_arguments, 2, 900, bf16)
    targets = [Target(PUBLIC.name, 1 / 8), Target(PLAIN_SDPA.name, 1.4)]
    against_flex = [Target(contender.name, 1 / 2) for contender in flex[1:]]
    part = "attention"
    return [
        Case(OP, "B 16 N 1100 bf16", True, headline, with_compiler, targets, part=part, peak_at_most=130 * MIB),
        Case(OP, "B 16 N 1100 bf16", False, without_gradients(headline), CONTENDERS, part=part),
        Case(OP, "B 2 N 900 bf16", True, decoder, CONTENDERS, part=part),
        Case(OP, "B 2 N 900 f32", True, partial(attention_arguments, 2, 900), CONTENDERS, part=part),
        Case(OP, "B 16 N 1100 bf16", True, headline, flex, against_flex, part="flex"),
    ]


def is_gpu_headline(case: Case) -> bool:
    return case.backward


def least_work(s: Sizes, backward: bool, e: int, f: int) -> Work:
    pairs = s["B"] * s["N"] * s["M"]
    query, key = s["B"] * s["H"] * s["N"] * s["D"], s["B"] * s["H"] * s["M"] * s["D"]
    rows = s["B"] * s["H"] * s["N"]
    factors = s["B"] * (s["N"] + s["M"]) * (2 * s["R"] + s["G"])
    head, rank, gate = s["H"] * s["D"], s["R"], s["G"]
    routed = rank > 0 or gate > 0
    if backward:
        return Work(
            memory_bytes=e * 4 * (query + key) + 4 * rows + 2 * f * factors,
            l1_bytes=0,
            matrix_flop=2 * pairs * (5 * head + 6 * rank + 3 * gate),
            lane_operations=pairs * (10 * routed + 5 * s["H"]) + query,
            special_functions=pairs * (s["H"] + routed),
        )
    return Work(
        memory_bytes=e * 2 * (query + key) + 4 * rows + f * factors,
        l1_bytes=0,
        matrix_flop=2 * pairs * (2 * head + 2 * rank + gate),
        lane_operations=pairs * (5 * routed + 4 * s["H"]),
        special_functions=pairs * (s["H"] + routed) + 2 * rows,
    )


COUNTED = {OP: Counted(least_work, {"B": 16, "H": 8, "N": 1100, "M": 1100, "D": 32, "R": 16, "G": 3})}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    (batch, heads, queries, channels), keys = arguments["query"].shape, arguments["key"].shape[2]
    routing = arguments.get("routing")
    rank, gate = (0, 0) if routing is None else (routing.sup_q.shape[2], routing.gate_q.shape[2])
    return {"B": batch, "H": heads, "N": queries, "M": keys, "D": channels, "R": rank, "G": gate}


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    routing = arguments.get("routing")
    return arguments["query"], arguments["query"] if routing is None else routing.sup_q


RANKS = ((16, 3), (32, 8), (64, 32))  # R and G


def kernel_calls() -> Iterator[KernelCall]:
    """Forward and backward for every dtype, D, rank and mask, of a detector's shape."""
    for dtype in FLOATING[:3]:
        for channels in (16, 32, 64, 128):
            yield from _kernel_calls(f"D={channels}", dtype, channels)
        yield from _kernel_calls("D=48 R=64 G=32", dtype, 48, ranks=(64, 32))
        yield from _kernel_calls("D=32 plain", dtype, 32, ranks=None)
        yield from _kernel_calls("D=32 masked", dtype, 32, masked=True)
        if dtype != torch.float32:
            yield from _kernel_calls("D=32 float32 factors", dtype, 32, factor_dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):  # float16 is as bfloat16
        for channels, ranks, masked in itertools.product((16, 32, 64, 128), RANKS, (False, True)):
            label = f"D={channels} R={ranks[0]} G={ranks[1]}{' masked' if masked else ''}"
            yield from _kernel_calls(label, dtype, channels, ranks=ranks, masked=masked)
        for channels in (32, 64):
            yield from _kernel_calls(f"D={channels} strength a tensor", dtype, channels, controlled=True)


def _kernel_calls(
    label: str, dtype: torch.dtype, channels: int, *, ranks: tuple[int, int] | None = (16, 3),
    factor_dtype: torch.dtype | None = None, masked: bool = False, controlled: bool = False,
) -> Iterator[KernelCall]:  # fmt: skip
    batch, heads, queries = 2, 8, 1100

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (empty(batch, queries, heads, channels).transpose(1, 2) for _ in range(3))
    rank, gate_rank = ranks or (0, 0)
    widths = (rank, rank, rank, rank, gate_rank, gate_rank) if ranks else ()
    routing = [empty(batch, queries, width, dtype=factor_dtype or dtype) for width in widths]
    output, lse = empty(batch, heads, queries, channels), empty(batch, heads, queries, dtype=torch.float32)
    grads = [output, output, output, *routing]
    if controlled:
        routing.append(empty(2, dtype=torch.float32))
        grads.append(empty(batch, queries, dtype=torch.float32))
    mask = empty(queries, queries).expand(batch, heads, -1, -1) if masked else None
    ranges = empty(batch, queries, 2, 2, dtype=torch.int32) if masked else None
    call = ([query, key, value], routing, mask, ranges, (1.0, 1.0, 5.0))
    label, family = f"{name_of(dtype)} {label}", (dtype, channels, rank or 16, "strength" if controlled else masked)
    yield KernelCall("forward", label, (*call, [output, lse]), family)
    yield KernelCall("backward", label, (output, [output, lse], *call, grads), family)
