"""What is measured on a GPU: the cases of `registry` in a detector's sizes and dtypes, with more contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import route_kernels as rk
from route_kernels.testing import (
    EAGER,
    Arguments,
    map_tensors,
    query_similarity_arguments,
    routed_attention_arguments,
    under_eager,
)

from .gpu_contenders import COMPILED_PUBLIC, FLEX_FACTORED, FLEX_LOOKED_UP, PUBLIC, compiled, on_backend
from .registry import (
    APART,
    CHANNELS,
    EAGER_ROUTING,
    GATE_RANK,
    HEADS,
    LEVERS,
    MS_DEFORM_ATTN,
    MS_DEFORM_ATTN_FUSED,
    OURS,
    PLAIN_SDPA,
    R50_LEVELS,
    RANK,
    ROUTED_ATTENTION,
    SMALL_LEVELS,
    Case,
    Contender,
    Sampling,
    Target,
    lever_contenders,
)

MIB = 2**20
DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class GpuCase(Case):
    """A row; `part` is the process it is measured in, `peak_at_most` a target for our bytes beside the inputs."""

    part: str = ""
    peak_at_most: int | None = None

    def arguments_on(self, device: torch.device) -> Arguments:
        moved = map_tensors(self.make_arguments(), lambda x: x.detach().to(device).requires_grad_(x.requires_grad))
        return moved


def attention_on_gpu(batch: int, queries: int, dtype: torch.dtype) -> Arguments:
    """H 8, D 32, R 16, G 3."""
    sizes = {"heads": HEADS, "channels": CHANNELS, "rank": RANK, "gate_rank": GATE_RANK}
    return routed_attention_arguments(batch=batch, queries=queries, dtype=dtype, **sizes)


def without_gradients(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    return lambda: map_tensors(make(), torch.Tensor.detach)


def _attention_cases() -> list[GpuCase]:
    alone = (ROUTED_ATTENTION, PUBLIC, EAGER_ROUTING, PLAIN_SDPA)
    with_compiler = (*alone, COMPILED_PUBLIC)  # in one case: compiling is what takes long
    flex = (ROUTED_ATTENTION, FLEX_FACTORED, FLEX_LOOKED_UP)
    op, bf16 = "routed_attention", torch.bfloat16
    headline, decoder = partial(attention_on_gpu, 16, 1100, bf16), partial(attention_on_gpu, 2, 900, bf16)
    targets = [Target(PUBLIC.name, 1 / 8), Target(PLAIN_SDPA.name, 1.4)]
    against_flex = [Target(contender.name, 1 / 2) for contender in flex[1:]]
    return [
        GpuCase(
            op, "B 16 N 1100 bf16", True, headline, with_compiler, targets, part="attention", peak_at_most=130 * MIB
        ),
        GpuCase(op, "B 16 N 1100 bf16", False, without_gradients(headline), alone, part="attention"),
        GpuCase(op, "B 2 N 900 bf16", True, decoder, alone, part="attention"),
        GpuCase(op, "B 2 N 900 f32", True, partial(attention_on_gpu, 2, 900, torch.float32), alone, part="attention"),
        GpuCase(op, "B 16 N 1100 bf16", True, headline, flex, against_flex, part="flex"),
    ]


def sampled_on_gpu(sampling: Sampling, dtype: torch.dtype, backward: bool, fused: bool) -> Arguments:
    """value in `dtype`; plain: locations and weights in float32; fused: raw offsets and logits in `dtype`.

    Offsets of a short dtype are odd sixteenths of a pixel, which it holds: rounding puts no sample on a pixel's centre.
    """
    arguments = sampling.arguments(backward)[fused]
    short = ("value", "sampling_offsets", "attention_logits") if fused else ("value",)
    if fused and dtype != torch.float32:
        offsets = arguments["sampling_offsets"].detach()
        arguments["sampling_offsets"] = ((offsets * 8).floor() / 8 + 1 / 16).requires_grad_(backward)
    for name in short:
        arguments[name] = arguments[name].detach().to(dtype).requires_grad_(backward)
    return arguments


SAMPLINGS = {  # all larger than an L2 cache, or rotated until they are
    "B 4 N = S = 22223, near": Sampling(R50_LEVELS, 4, 22223, near=True),
    "B 4 N = S = 22223, uniform": Sampling(R50_LEVELS, 4, 22223, near=False),
    "B 1 N = S = 5440, near": Sampling(SMALL_LEVELS, 1, 5440, near=True),
    "B 2 N 900, uniform": Sampling(R50_LEVELS, 2, 900, near=False),
}
SAMPLED_BY = {"ms_deform_attn": MS_DEFORM_ATTN, "ms_deform_attn_fused": MS_DEFORM_ATTN_FUSED}
HEADLINE = "B 4 N = S = 22223, near bf16"
OF_THE_BEST = {False: 1 / 2, True: 1 / 2.5}
OF_THE_PARTS = 1 / 1.3
"""Our time at the headline, forward or with backward, at most of that of every other; fused, of its parts' apart."""


def _compiled_eager(op: str) -> Contender:
    return Contender("eager, torch.compile", under_eager(compiled(getattr(rk, op))), EAGER[op])


def _deformable_cases() -> list[GpuCase]:
    found: list[GpuCase] = []
    for op, contenders in SAMPLED_BY.items():
        for dtype, suffix in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
            for sampled, sampling in SAMPLINGS.items():
                for backward in (True, False):
                    name = f"{sampled} {suffix}"
                    make = partial(sampled_on_gpu, sampling, dtype, backward, op == "ms_deform_attn_fused")
                    others, targets = (*contenders, on_backend(op, "triton")), []
                    if name == HEADLINE:
                        others = (*others, _compiled_eager(op))  # compiling takes long
                        targets = (
                            [Target(APART, OF_THE_PARTS)]
                            if op == "ms_deform_attn_fused"
                            else [Target(other.name, OF_THE_BEST[backward]) for other in others[1:]]
                        )
                    found.append(GpuCase(op, name, backward, make, others, targets, part=op))
    return found


def _similarity_cases() -> list[GpuCase]:
    op = "query_similarity"
    contenders = (
        Contender(OURS, rk.query_similarity, EAGER[op]),
        Contender("eager, N x N written out", EAGER[op], EAGER[op]),
        _compiled_eager(op),
    )
    make = partial(query_similarity_arguments, batch=16, queries=1100, channels=256, dtype=torch.bfloat16)
    return [GpuCase(op, "B 16 N 1100 bf16", False, make, contenders, part=op)]


def _lever_cases() -> list[GpuCase]:
    return [
        GpuCase(
            op, f"B 2 N 22223 {suffix}", True, partial(make, batch=2, queries=22223, dtype=dtype),
            (*lever_contenders(op), _compiled_eager(op)), part=op,
        )
        for op, (make, _) in LEVERS.items()
        for dtype, suffix in ((torch.bfloat16, "bf16"), (torch.float32, "f32"))
    ]  # fmt: skip


def gpu_cases() -> list[GpuCase]:
    """Every row, the most important of each part first."""
    return _attention_cases() + _deformable_cases() + _similarity_cases() + _lever_cases()


def parts() -> list[str]:
    return list(dict.fromkeys(case.part for case in gpu_cases()))
