"""Benchmarks of `ms_deform_attn`: sampling near and anywhere, and what it shares with `ms_deform_attn_fused`.

ms_deform_attn, with T = B N H K samples; in brackets what the fused form adds

    forward   memory   e (V + B N H D) + 3 f T [+ f B N L_ref 2]     V = B H min(S, 4 N K) D: what is sampled of value
              L1       4 e D T                        four corners of a sample
              special  0 [T + B N H]                  exponentials of the softmax, reciprocals of its sums
              lanes    T (4 D + 14 [+ 6])             four corners; pixels, floors, fractions, weights of the corners
                                                      [max, subtract, sum, normalise; location of the offset: 2]
    backward  memory   e (V + B N H D + B S H D) + 6 f T [+ f B N L_ref 2]      value, dO, dvalue; the others twice
              L1       4 e D T + 4 . 4 D T            corners again, their gradients added in float32
              special  0 [T + B N H]
              lanes    T (8 D + 26 [+ 9])             four products dO . v_c, four weighted dO; 14 again, 12 of the
                                                      sample's adjoint [6 again, 3 of the softmax's adjoint]

References as (x, y).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from route_kernels.precision import FLOATING
from route_kernels.testing import EAGER, Arguments

from ..gpu_contenders import DTYPES, compiled_eager, on_backend
from ..registry import Case, Contender, GpuCase, Target, Unavailable, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, Sizes, Work, name_of

OP = "ms_deform_attn"
PEER = "torch-ms-deform-attn 0.1.1"
HEADS, CHANNELS, POINTS = 8, 32, 4
R50_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an 800 x 1333 image
SMALL_LEVELS = ((64, 64), (32, 32), (16, 16), (8, 8))
Levels = Sequence[tuple[int, int]]

TUNED_LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))  # of an 800 x 1066 image
TUNED_POSITIONS = sum(height * width for height, width in TUNED_LEVELS)
TUNED: Mapping[str, Arguments] = {
    "decoder": dict(levels=TUNED_LEVELS, batch=2, heads=8, channels=32, queries=900, points=4),
    "encoder": dict(levels=TUNED_LEVELS, batch=2, heads=8, channels=32, queries=TUNED_POSITIONS, points=4),
}
GPU_SECONDS = 55


@dataclass(frozen=True)
class Sampling:
    """Where the queries of a deformable case sample: near their own feature position, or anywhere."""

    levels: Levels
    batch: int
    queries: int
    near: bool

    def locations(self) -> tuple[Tensor, Tensor]:
        """Reference points [B, N, L, 2] and sampling locations [B, N, H, L, P, 2], as (x, y) in [0, 1].

        Fractions of a pixel lie in [0.05, 0.95]: at a pixel's centre, rounding decides which of two slopes is taken.
        """
        generator = torch.Generator().manual_seed(0)
        sizes = torch.tensor([(width, height) for height, width in self.levels], dtype=torch.float32)[:, None]
        shape = (self.batch, self.queries, HEADS, len(self.levels), POINTS, 2)
        if self.near:
            centres = [
                torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in self.levels
            ]
            reference = torch.cat(centres).flip(-1).expand(self.batch, -1, -1)
            pixels = reference[:, :, None, None, None] * sizes - 0.5 + 3 * torch.randn(shape, generator=generator)
        else:
            reference = torch.rand(self.batch, self.queries, 2, generator=generator)
            pixels = torch.rand(shape, generator=generator) * sizes - 0.5
        pixels = pixels.floor() + 0.05 + 0.9 * (pixels - pixels.floor())
        return reference[:, :, None].expand(-1, -1, len(self.levels), -1).contiguous(), (pixels + 0.5) / sizes

    def arguments(self, backward: bool) -> tuple[Arguments, Arguments]:
        """Equal calls of `ms_deform_attn` and of `ms_deform_attn_fused`, without gradients unless `backward`."""
        generator = torch.Generator().manual_seed(1)
        sizes = torch.tensor([(width, height) for height, width in self.levels])[:, None]
        reference, locations = self.locations()
        positions = sum(height * width for height, width in self.levels)
        value = torch.randn(self.batch, positions, HEADS, CHANNELS, generator=generator)
        logits = torch.randn(self.batch, self.queries, HEADS, len(self.levels) * POINTS, generator=generator)
        offsets = ((locations - reference[:, :, None, :, None]) * sizes).flatten(3, 4)
        weights = logits.softmax(-1).unflatten(-1, (len(self.levels), POINTS))
        for tensor in (value, locations, weights, offsets, logits):
            tensor.requires_grad_(backward)
        start = {"value": value, "spatial_shapes": self.levels}
        plain = {"level_start_index": None, "sampling_locations": locations, "attention_weights": weights}
        fused = {"reference_points": reference, "sampling_offsets": offsets, "attention_logits": logits}
        return {**start, **plain}, {**start, **fused}


def _peer(value, spatial_shapes, level_start_index, sampling_locations, attention_weights) -> Tensor:
    """`ms_deform_attn` of the strongest package on PyPI."""
    try:
        package = importlib.import_module("torch_ms_deform_attn")
    except (ImportError, OSError) as error:
        raise Unavailable(f"{PEER} cannot be imported: {error}") from error
    shapes, starts = _level_tensors(tuple(spatial_shapes), value.device)
    return package.ms_deform_attn(value, shapes, starts, sampling_locations, attention_weights)


@cache  # a copy to a GPU cannot be captured into a graph
def _level_tensors(spatial_shapes: Levels, device: torch.device) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor(spatial_shapes)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return shapes.to(device), starts.to(device)


CONTENDERS = (ours(OP), Contender(PEER, _peer, EAGER[OP]), eager(OP, "eager grid_sample"))
SAMPLINGS = {
    "B 1 N 900, uniform": Sampling(R50_LEVELS, 1, 900, near=False),
    "B 1 N = S = 22223, uniform": Sampling(R50_LEVELS, 1, 22223, near=False),
    "B 1 N = S = 22223, near": Sampling(R50_LEVELS, 1, 22223, near=True),
    "B 2 N = S = 5440, near": Sampling(SMALL_LEVELS, 2, 5440, near=True),
}


def sampled_cases(op: str, contenders: Sequence[Contender], targets: Callable[[Sampling], list[Target]]) -> list[Case]:
    """Rows of `ms_deform_attn` or `ms_deform_attn_fused`."""
    fused = op != OP
    return [
        Case(
            op, name, backward, lambda sampling=sampling, backward=backward: sampling.arguments(backward)[fused],
            contenders, targets(sampling), quick=in_decoder(sampling),
        )
        for name, sampling in SAMPLINGS.items()
        for backward in (False, True)
    ]  # fmt: skip


def in_decoder(sampling: Sampling) -> bool:
    return sampling.queries == 900


def cases() -> list[Case]:
    return sampled_cases(OP, CONTENDERS, lambda sampling: [] if in_decoder(sampling) else [Target(PEER, 1 / 3)])


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


GPU_SAMPLINGS = {  # all larger than an L2 cache, or rotated until they are
    "B 4 N = S = 22223, near": Sampling(R50_LEVELS, 4, 22223, near=True),
    "B 4 N = S = 22223, uniform": Sampling(R50_LEVELS, 4, 22223, near=False),
    "B 1 N = S = 5440, near": Sampling(SMALL_LEVELS, 1, 5440, near=True),
    "B 2 N 900, uniform": Sampling(R50_LEVELS, 2, 900, near=False),
}
HEADLINE = "B 4 N = S = 22223, near bf16"
OF_THE_BEST = {False: 1 / 2, True: 1 / 2.5}
"""Our time at the headline, forward or with backward, at most of that of every other."""


def sampled_gpu_cases(
    op: str, contenders: Sequence[Contender], targets: Callable[[bool, Sequence[Contender]], list[Target]]
) -> Iterator[GpuCase]:
    """Rows of `ms_deform_attn` or `ms_deform_attn_fused`; `targets` those of the headline and its contenders."""
    for dtype, suffix in DTYPES:
        for sampled, sampling in GPU_SAMPLINGS.items():
            for backward in (True, False):
                name = f"{sampled} {suffix}"
                make = partial(sampled_on_gpu, sampling, dtype, backward, op != OP)
                others, held = (*contenders, on_backend(op, "triton")), []
                if name == HEADLINE:
                    others = (*others, compiled_eager(op))  # compiling takes long
                    held = targets(backward, others)
                yield GpuCase(op, name, backward, make, others, held, part=op)


def gpu_cases() -> list[GpuCase]:
    def targets(backward: bool, contenders: Sequence[Contender]) -> list[Target]:
        return [Target(other.name, OF_THE_BEST[backward]) for other in contenders[1:]]

    return list(sampled_gpu_cases(OP, CONTENDERS, targets))


def is_gpu_headline(case: GpuCase) -> bool:
    return case.backward and "N = S" in case.name


def sampling_work(s: Sizes, backward: bool, e: int, f: int, fused: bool) -> Work:
    samples = s["B"] * s["N"] * s["H"] * s["K"]
    value = s["B"] * s["S"] * s["H"] * s["D"]
    sampled = s["B"] * s["H"] * min(s["S"], 4 * s["N"] * s["K"]) * s["D"]
    output = s["B"] * s["N"] * s["H"] * s["D"]
    references = s["B"] * s["N"] * s.get("L_ref", 1) * 2 * fused
    softmax = (samples + s["B"] * s["N"] * s["H"]) * fused
    corners = 4 * s["D"] * samples
    if backward:
        return Work(
            memory_bytes=e * (sampled + output + value) + f * (6 * samples + references),
            l1_bytes=(e + 4) * corners,
            matrix_flop=0,
            lane_operations=2 * corners + (26 + 9 * fused) * samples,
            special_functions=softmax,
        )
    return Work(
        memory_bytes=e * (sampled + output) + f * (3 * samples + references),
        l1_bytes=e * corners,
        matrix_flop=0,
        lane_operations=corners + (14 + 6 * fused) * samples,
        special_functions=softmax,
    )


R50_SIZES = {"B": 2, "H": 8, "N": R50_POSITIONS, "S": R50_POSITIONS, "K": 16, "D": 32}
COUNTED = {OP: Counted(partial(sampling_work, fused=False), R50_SIZES)}


def sampled_sizes(value: Tensor, places: Tensor) -> dict[str, int]:
    """Sizes of value [B, S, H, D] and locations or offsets [B, N, H, ..., 2]."""
    batch, positions, heads, channels = value.shape
    queries, samples = places.shape[1], places.shape[3:-1].numel()
    return {"B": batch, "H": heads, "N": queries, "S": positions, "K": samples, "D": channels}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    return sampled_sizes(arguments["value"], arguments["sampling_locations"])


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["value"], arguments["sampling_locations"]


KERNEL_LEVELS = (*itertools.chain(*R50_LEVELS), *(0,) * len(R50_LEVELS), *(POINTS,) * len(R50_LEVELS))
"""The kernels' argument `levels`, sizes, starts and counts of points, of an image of 800 x 1333 pixels."""


def kernel_calls() -> Iterator[KernelCall]:
    """A detector's encoder for every dtype, with both ways to sum the gradient of value, and D of no power of two."""
    for dtype, channels in (*((dtype, 32) for dtype in FLOATING), (torch.bfloat16, 24)):
        heads, points = 8, 4 * len(R50_LEVELS)
        point_dtype = torch.promote_types(dtype, torch.float32)
        value = torch.empty(1, R50_POSITIONS, heads, channels, dtype=dtype, device="meta")
        locations = torch.empty(1, R50_POSITIONS, heads, points, 2, dtype=point_dtype, device="meta")
        weights = locations[..., 0].contiguous()
        output, label = value.flatten(2), f"{name_of(dtype)} D={channels}"
        inputs, grads = (value, KERNEL_LEVELS, locations, weights), [value, locations, weights]
        yield KernelCall("forward", label, (*inputs, output))
        for way, deterministic in (("", False), (" deterministic", True)):
            yield KernelCall("backward", label + way, (output, *inputs, deterministic, grads))
