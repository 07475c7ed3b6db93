"""Benchmarks of `ms_deform_attn_fused`: the sampling of `ms_deform_attn`, against its parts apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import route_kernels as rk
from route_kernels.precision import FLOATING
from route_kernels.testing import EAGER

from ..registry import Case, Contender, GpuCase, Target, eager, ours
from ..work import R50_POSITIONS, Counted, KernelCall, name_of
from .ms_deform_attn import (
    KERNEL_LEVELS,
    R50_LEVELS,
    R50_SIZES,
    TUNED,  # noqa: F401
    Levels,
    is_gpu_headline,  # noqa: F401
    sampled_cases,
    sampled_gpu_cases,
    sampled_sizes,
    sampling_work,
)

OP = "ms_deform_attn_fused"
APART = "softmax, locations, our ms_deform_attn"
GPU_SECONDS = 45
OF_THE_PARTS = 1 / 1.3
"""Our time at the headline of that of its parts apart, at most."""


@cache
def _widths_and_heights(spatial_shapes: Levels, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([(width, height) for height, width in spatial_shapes], dtype=dtype).to(device)  # [L, 2]


def _apart(value, spatial_shapes, reference_points, sampling_offsets, attention_logits) -> Tensor:
    """The steps that `ms_deform_attn_fused` takes in one pass, one after the other."""
    levels = len(spatial_shapes)
    weights = attention_logits.softmax(-1).unflatten(-1, (levels, -1))
    sizes = _widths_and_heights(tuple(spatial_shapes), sampling_offsets.dtype, sampling_offsets.device)
    offsets = sampling_offsets.unflatten(3, (levels, -1)) / sizes[:, None]
    return rk.ms_deform_attn(value, spatial_shapes, None, reference_points[:, :, None, :, None] + offsets, weights)


CONTENDERS = (ours(OP), Contender(APART, _apart, EAGER[OP]), eager(OP, "eager grid_sample"))


def cases() -> list[Case]:
    return sampled_cases(OP, CONTENDERS, lambda sampling: [Target(APART, 1.0)])


def gpu_cases() -> list[GpuCase]:
    return list(sampled_gpu_cases(OP, CONTENDERS, lambda backward, contenders: [Target(APART, OF_THE_PARTS)]))


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
