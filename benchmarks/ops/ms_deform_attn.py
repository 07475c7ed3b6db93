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

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from route_kernels.precision import FLOATING
from route_kernels.testing import Arguments

from ..contenders import DTYPES, FLOAT32_SUMS, PEER, PEERS, Levels, compiled_eager, in_the_fast_mode, on_backend
from ..registry import Case, Contender, Target, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, Sizes, Work, name_of

OP = "ms_deform_attn"
HEADS, CHANNELS, POINTS = 8, 32, 4
R50_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an 800 x 1333 image
SMALL_LEVELS = ((64, 64), (32, 32), (16, 16), (8, 8))

TUNED_LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))  # of an 800 x 1066 image
TUNED_POSITIONS = sum(height * width for height, width in TUNED_LEVELS)
TUNED: Mapping[str, Arguments] = {
    "decoder": dict(levels=TUNED_LEVELS, batch=2, heads=8, channels=32, queries=900, points=4),
    "encoder": dict(levels=TUNED_LEVELS, batch=2, heads=8, channels=32, queries=TUNED_POSITIONS, points=4),
}
GPU_SECONDS = 55


@dataclass(frozen=True)
class Sampling:
    """Where the queries of a deformable case sample: near their own feature position, or anywhere.

    `points` of each level, or of all; `quick`: it takes milliseconds.
    """

    levels: Levels
    batch: int
    queries: int
    near: bool
    heads: int = HEADS
    channels: int = CHANNELS
    points: int | tuple[int, ...] = POINTS
    quick: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """Points of each level."""
        return (self.points,) * len(self.levels) if isinstance(self.points, int) else self.points

    def locations(self) -> tuple[Tensor, Tensor]:
        """Reference points [B, N, L, 2] and sampling locations [B, N, H, K, 2], as (x, y) in [0, 1].

        Fractions of a pixel lie in [0.05, 0.95]: at a pixel's centre, rounding decides which of two slopes is taken.
        """
        generator = torch.Generator().manual_seed(0)
        sizes = self._sizes()
        shape = (self.batch, self.queries, self.heads, sum(self.counts), 2)
        if self.near:
            centres = [
                torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in self.levels
            ]
            reference = torch.cat(centres).flip(-1).expand(self.batch, -1, -1)
            pixels = reference[:, :, None, None] * sizes - 0.5 + 3 * torch.randn(shape, generator=generator)
        else:
            reference = torch.rand(self.batch, self.queries, 2, generator=generator)
            pixels = torch.rand(shape, generator=generator) * sizes - 0.5
        pixels = pixels.floor() + 0.05 + 0.9 * (pixels - pixels.floor())
        return reference[:, :, None].expand(-1, -1, len(self.levels), -1).contiguous(), (pixels + 0.5) / sizes

    def _sizes(self) -> Tensor:
        """[K, 2]: width and height of each point's level."""
        sizes = torch.tensor([(width, height) for height, width in self.levels], dtype=torch.float32)
        return sizes.repeat_interleave(torch.tensor(self.counts), 0)

    def arguments(self, backward: bool) -> tuple[Arguments, Arguments]:
        """Equal calls of `ms_deform_attn` and of `ms_deform_attn_fused`, without gradients unless `backward`."""
        generator = torch.Generator().manual_seed(1)
        reference, locations = self.locations()
        positions, levels = sum(height * width for height, width in self.levels), len(self.levels)
        value = torch.randn(self.batch, positions, self.heads, self.channels, generator=generator)
        logits = torch.randn(locations.shape[:-1], generator=generator)
        of_points = reference.repeat_interleave(torch.tensor(self.counts), 2)  # [B, N, K, 2]
        offsets, weights = (locations - of_points[:, :, None]) * self._sizes(), logits.softmax(-1)
        if isinstance(self.points, int):
            locations, weights = locations.unflatten(3, (levels, -1)), weights.unflatten(3, (levels, -1))
        for tensor in (value, locations, weights, offsets, logits):
            tensor.requires_grad_(backward)
        start = {"value": value, "spatial_shapes": self.levels}
        plain = {"level_start_index": None, "sampling_locations": locations, "attention_weights": weights}
        fused = {"reference_points": reference, "sampling_offsets": offsets, "attention_logits": logits}
        uneven = {} if isinstance(self.points, int) else {"points": self.points}
        return {**start, **plain, **uneven}, {**start, **fused, **uneven}


CONTENDERS = (ours(OP), *PEERS, eager(OP, "eager grid_sample"))
RT_DETR_LEVELS = ((80, 80), (40, 40), (20, 20))  # of a 640 x 640 image
ENCODER = "N = S = 22223, near"
SAMPLINGS = {
    "cpu": {
        "B 1 N 300, uniform": Sampling(R50_LEVELS, 1, 300, near=False, quick=True),
        "B 1 N 900, uniform": Sampling(R50_LEVELS, 1, 900, near=False, quick=True),
        "B 1 N = S = 22223, uniform": Sampling(R50_LEVELS, 1, 22223, near=False),
        f"B 1 {ENCODER}": Sampling(R50_LEVELS, 1, 22223, near=True),
        "B 2 N = S = 5440, near": Sampling(SMALL_LEVELS, 2, 5440, near=True),
    },
    "cuda": {  # all larger than an L2 cache, or rotated until they are
        f"B 2 {ENCODER}": Sampling(R50_LEVELS, 2, 22223, near=True),
        f"B 4 {ENCODER}": Sampling(R50_LEVELS, 4, 22223, near=True),
        f"B 1 {ENCODER}": Sampling(R50_LEVELS, 1, 22223, near=True),
        "B 2 N 300, uniform": Sampling(R50_LEVELS, 2, 300, near=False),
        "B 2 N 900, uniform": Sampling(R50_LEVELS, 2, 900, near=False),
        "B 4 N = S = 22223, uniform": Sampling(R50_LEVELS, 4, 22223, near=False),
    },
}
DETECTORS = {
    "rfdetr: B 1 H 16 D 16 L 1 P 2 N 13 x 300": Sampling(
        ((36, 36),), 1, 13 * 300, near=False, heads=16, channels=16, points=2, quick=True
    ),
    "RT-DETR: B 4 L 3 N 300": Sampling(RT_DETR_LEVELS, 4, 300, near=False, quick=True),
    "D-FINE: B 4 L 3 P 3 6 3 N 300": Sampling(RT_DETR_LEVELS, 4, 300, near=False, points=(3, 6, 3), quick=True),
}
"""Shapes of other detectors: on every device."""

IN_FLOAT32 = (f"B 2 {ENCODER}", "B 2 N 900, uniform")  # on a GPU, the others in bfloat16 alone
HEADLINE = f"B 2 {ENCODER} bf16"
AT_MOST_US = 150.0  # of forward at the headline
OF_THE_BEST = 1 / 2.5  # our time at the headline, with backward, of that of the strongest peer that sums in float32
DETERMINISTIC = 1.5  # times the fast mode


def sampled_cases(
    op: str,
    device: str,
    contenders: Sequence[Contender],
    targets: Callable[[str, Sampling, bool], list[Target]],
) -> Iterator[Case]:
    """Rows of `ms_deform_attn` or `ms_deform_attn_fused`; `targets` by name, sampling and whether with backward."""
    dtypes = DTYPES if device == "cuda" else ((torch.float32, ""),)
    fused, headline = op != OP, HEADLINE if device == "cuda" else "B 1 N 900, uniform"
    for dtype, suffix in dtypes:
        for sampled, sampling in (SAMPLINGS[device] | DETECTORS).items():
            if suffix == "f32" and sampled not in IN_FLOAT32:
                continue
            for backward in (True, False) if device == "cuda" else (False, True):
                name = f"{sampled} {suffix}".rstrip()
                others = (*contenders, on_backend(op, "triton"))
                if name == headline:
                    others = (*others, compiled_eager(op))  # compiling takes long
                yield Case(
                    op, name, backward, partial(sampled_on, sampling, dtype, backward, fused), others,
                    targets(name, sampling, backward), quick=sampling.quick, part=op,
                    microseconds_at_most=AT_MOST_US if name == HEADLINE and not backward else None,
                )  # fmt: skip


def cases(device: str) -> list[Case]:
    def targets(name: str, sampling: Sampling, backward: bool) -> list[Target]:
        if device == "cuda":
            return [Target(FLOAT32_SUMS, OF_THE_BEST)] if name == HEADLINE and backward else []
        return [Target(PEER, 1 / 3)] if sampling.queries > 5000 else []

    found = list(sampled_cases(OP, device, CONTENDERS, targets))
    deterministic, fast = in_the_fast_mode(OP)
    like = next(case for case in found if case.backward and case.name in (HEADLINE, "B 2 N = S = 5440, near"))
    held = [Target(fast.name, DETERMINISTIC)] if device == "cuda" else []
    both = Case(OP, f"{like.name}, deterministic", True, like.make_arguments, (deterministic, fast), held, part=OP)
    return [*found, both]


def sampled_on(sampling: Sampling, dtype: torch.dtype, backward: bool, fused: bool) -> Arguments:
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


def is_gpu_headline(case: Case) -> bool:
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
