"""What is measured: every case with its arguments, its contenders and the targets that it is held to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

import route_kernels as rk
from route_kernels.testing import (
    EAGER,
    Arguments,
    add_layer_norm_arguments,
    query_similarity_arguments,
    routed_attention_arguments,
    sigmoid_focal_loss_arguments,
)

OURS = "route-kernels"
PEER = "torch-ms-deform-attn 0.1.1"
APART = "softmax, locations, our ms_deform_attn"
HEADS, CHANNELS, POINTS = 8, 32, 4
RANK, GATE_RANK = 16, 3
R50_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an 800 x 1333 image
SMALL_LEVELS = ((64, 64), (32, 32), (16, 16), (8, 8))
Levels = Sequence[tuple[int, int]]


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """`call(**arguments)` gives the output; `formula` is what it should compute, in PyTorch's own operators.

    `takes` names the arguments that both are given; None is all.
    """

    name: str
    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    takes: tuple[str, ...] | None = None

    def taken(self, arguments: Arguments) -> Arguments:
        return arguments if self.takes is None else {name: arguments[name] for name in self.takes}


@dataclass(frozen=True)
class Target:
    """Our time is at most `at_most` times that of the contender `against`."""

    against: str
    at_most: float


@dataclass(frozen=True)
class Case:
    """A row: `contenders[0]` is ours; what `make_arguments` marks as requiring a gradient is differentiated."""

    op: str
    name: str
    backward: bool
    make_arguments: Callable[[], Arguments]
    contenders: Sequence[Contender]
    targets: Sequence[Target] = ()
    quick: bool = False


def attention_arguments(batch: int, queries: int) -> Arguments:
    """As the speed and the memory rows take them: H 8, D 32, R 16, G 3."""
    sizes = {"heads": HEADS, "channels": CHANNELS, "rank": RANK, "gate_rank": GATE_RANK}
    return routed_attention_arguments(batch=batch, queries=queries, **sizes)


ROUTED_ATTENTION = Contender(OURS, rk.routed_attention, EAGER["routed_attention"])
PLAIN_SDPA = Contender(
    "plain SDPA, no bias", F.scaled_dot_product_attention, EAGER["routed_attention"], ("query", "key", "value")
)
EAGER_ROUTING = Contender("eager, bias written out", EAGER["routed_attention"], EAGER["routed_attention"])


def _routed_attention_cases() -> list[Case]:
    contenders = (ROUTED_ATTENTION, PLAIN_SDPA, EAGER_ROUTING)
    rows = ((2, 300, None), (2, 900, 1.2), (2, 1100, None), (1, 2048, 1.0))
    return [
        Case(
            "routed_attention",
            f"B {batch} N {queries}",
            True,
            partial(attention_arguments, batch, queries),
            contenders,
            [] if at_most is None else [Target(PLAIN_SDPA.name, at_most)],
            quick=queries == 300,
        )
        for batch, queries, at_most in rows
    ]


def _query_similarity_cases() -> list[Case]:
    def written_out(x: Tensor, mode: str) -> Tensor:
        unit = F.normalize(x, dim=-1)
        cosines = (unit @ unit.mT).relu_()
        cosines.diagonal(dim1=1, dim2=2).zero_()
        return cosines.mean(dim=-1)

    contenders = (
        Contender(OURS, rk.query_similarity, EAGER["query_similarity"]),
        Contender("eager, N x N written out", written_out, EAGER["query_similarity"]),
    )
    return [
        Case(
            "query_similarity",
            f"B {batch} N {queries}",
            False,
            partial(query_similarity_arguments, batch=batch, queries=queries, channels=256),
            contenders,
            quick=queries == 300,
        )
        for batch, queries in ((2, 300), (2, 900), (1, 2048))
    ]


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


@cache
def _widths_and_heights(spatial_shapes: Levels, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([(width, height) for height, width in spatial_shapes], dtype=dtype).to(device)  # [L, 2]


def _apart(value, spatial_shapes, reference_points, sampling_offsets, attention_logits) -> Tensor:
    """What `ms_deform_attn_fused` does in one pass, one after the other."""
    levels = len(spatial_shapes)
    weights = attention_logits.softmax(-1).unflatten(-1, (levels, -1))
    sizes = _widths_and_heights(tuple(spatial_shapes), sampling_offsets.dtype, sampling_offsets.device)
    offsets = sampling_offsets.unflatten(3, (levels, -1)) / sizes[:, None]
    return rk.ms_deform_attn(value, spatial_shapes, None, reference_points[:, :, None, :, None] + offsets, weights)


MS_DEFORM_ATTN = (
    Contender(OURS, rk.ms_deform_attn, EAGER["ms_deform_attn"]),
    Contender(PEER, _peer, EAGER["ms_deform_attn"]),
    Contender("eager grid_sample", EAGER["ms_deform_attn"], EAGER["ms_deform_attn"]),
)
MS_DEFORM_ATTN_FUSED = (
    Contender(OURS, rk.ms_deform_attn_fused, EAGER["ms_deform_attn_fused"]),
    Contender(APART, _apart, EAGER["ms_deform_attn_fused"]),
    Contender("eager grid_sample", EAGER["ms_deform_attn_fused"], EAGER["ms_deform_attn_fused"]),
)


DEFORMABLE_CASES = {
    "B 1 N 900, uniform": Sampling(R50_LEVELS, 1, 900, near=False),
    "B 1 N = S = 22223, uniform": Sampling(R50_LEVELS, 1, 22223, near=False),
    "B 1 N = S = 22223, near": Sampling(R50_LEVELS, 1, 22223, near=True),
    "B 2 N = S = 5440, near": Sampling(SMALL_LEVELS, 2, 5440, near=True),
}


def _deformable_cases() -> list[Case]:
    plain, fused = [], []
    for name, sampling in DEFORMABLE_CASES.items():
        in_decoder = sampling.queries == 900
        against_peer = [] if in_decoder else [Target(PEER, 1 / 3)]
        for backward in (False, True):
            both = partial(sampling.arguments, backward)
            row = {"name": name, "backward": backward, "quick": in_decoder}
            plain.append(
                Case(
                    op="ms_deform_attn",
                    make_arguments=lambda both=both: both()[0],
                    contenders=MS_DEFORM_ATTN,
                    targets=against_peer,
                    **row,
                )
            )
            fused.append(
                Case(
                    op="ms_deform_attn_fused",
                    make_arguments=lambda both=both: both()[1],
                    contenders=MS_DEFORM_ATTN_FUSED,
                    targets=[Target(APART, 1.0)],
                    **row,
                )
            )
    return plain + fused


LEVERS = {
    "add_layer_norm": (partial(add_layer_norm_arguments, channels=256), "sum and layer_norm"),
    "sigmoid_focal_loss": (partial(sigmoid_focal_loss_arguments, classes=91), "eager, one-hot targets"),
}
"""By op, the arguments of a training step but for batch, queries and dtype, and what PyTorch's own form is called."""


def lever_contenders(op: str) -> tuple[Contender, ...]:
    return Contender(OURS, getattr(rk, op), EAGER[op]), Contender(LEVERS[op][1], EAGER[op], EAGER[op])


def _lever_cases() -> list[Case]:
    return [
        Case(
            op,
            f"B 1 N {queries}",
            True,
            partial(make, batch=1, queries=queries),
            lever_contenders(op),
            quick=queries == 900,
        )
        for op, (make, _) in LEVERS.items()
        for queries in (900, 22223)
    ]


def cases() -> list[Case]:
    """Every row of speed, an op at a time."""
    return _routed_attention_cases() + _deformable_cases() + _query_similarity_cases() + _lever_cases()
