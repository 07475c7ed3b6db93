"""Benchmarks of `ms_deform_attn_fused`: the sampling of `ms_deform_attn`, against its parts apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import route_kernels as rk
from route_kernels.precision import FLOATING
from route_kernels.testing import EAGER

from ..contenders import FUSED_PEERS, equal_points, located
from ..registry import Case, Contender, Target, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, name_of
from .ms_deform_attn import (
    DETECTORS,
    HEADLINE,
    KERNEL_LEVELS,
    R50_LEVELS,
    R50_SIZES,
    TUNED,  # noqa: F401
    Sampling,
    is_gpu_headline,  # noqa: F401
    sampled_cases,
    sampled_sizes,
    sampling_work,
)

OP = "ms_deform_attn_fused"
APART = "softmax, locations, our ms_deform_attn"
GPU_SECONDS = 45
OF_THE_PARTS = 1 / 1.3
"""Our time at the headline of that of its parts apart, at most."""


def _apart(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points=None) -> Tensor:
    """The steps that `ms_deform_attn_fused` takes in one pass, one after the other."""
    equal_points("this", points)
    weights = attention_logits.softmax(-1).unflatten(-1, (len(spatial_shapes), -1))
    locations = located(spatial_shapes, reference_points, sampling_offsets)
    return rk.ms_deform_attn(value, spatial_shapes, None, locations, weights)


CONTENDERS = (ours(OP), Contender(APART, _apart, EAGER[OP]), *FUSED_PEERS, eager(OP, "eager grid_sample"))


def cases(device: str) -> list[Case]:
    def targets(name: str, sampling: Sampling, backward: bool) -> list[Target]:
        if device == "cuda":
            return [Target(APART, OF_THE_PARTS)] if name == HEADLINE else []
        return [Target(APART, 1.0)] if isinstance(sampling.points, int) and sampling not in DETECTORS.values() else []

    return list(sampled_cases(OP, device, CONTENDERS, targets))


COUNTED = {OP: Counted(partial(sampling_work, fused=True), {**R50_SIZES, "L_ref": 4})}


def sizes_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    sizes = sampled_sizes(arguments["value"], arguments["sampling_offsets"])
    return {**sizes, "L_ref": arguments["reference_points"].shape[2]}


def main_and_factor(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return arguments["value"], arguments["sampling_offsets"]


def kernel_calls() -> Iterator[KernelCall]:
    """A detector's decoder for every dtype: boxes of each level, a mask, every gradient; with points, neither."""
    batch, queries, heads, channels = 2, 900, 8, 32
    points = 4 * len(R50_LEVELS)
    for dtype, coordinates, masked in (*((dtype, 4, True) for dtype in FLOATING), (torch.bfloat16, 2, False)):
        point_dtype = torch.promote_types(dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = point_dtype) -> Tensor:
            return torch.empty(batch, *shape, dtype=dtype, device="meta")

        value, mask = empty(R50_POSITIONS, heads, channels, dtype=dtype), empty(R50_POSITIONS, dtype=torch.bool)
        offsets, logits = empty(queries, heads, points, 2), empty(queries, heads, points)
        references = empty(queries, len(R50_LEVELS), coordinates)
        output = empty(queries, heads * channels, dtype=dtype)
        inputs = (value, KERNEL_LEVELS, references, offsets, logits, mask if masked else None)
        grads = [value, offsets, logits, *([references] if masked else [])]
        label = f"{name_of(dtype)} D={channels} coordinates={coordinates}"
        yield KernelCall("forward", label, (*inputs, output))
        yield KernelCall("backward", label, (output, *inputs, False, grads))
