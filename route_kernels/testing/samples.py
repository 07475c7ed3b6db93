"""Sample inputs of every public op, scaled as a detector's are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..ops.routed_attention import RoutingFactors
from .arguments import Arguments

LEVELS = ((5, 7), (3, 4), (1, 1))  # odd sizes and a level of one pixel


def routed_attention_arguments(
    *,
    batch: int = 2,
    heads: int = 2,
    queries: int = 33,
    keys: int | None = None,
    channels: int = 8,
    rank: int = 4,
    gate_rank: int = 3,
    limit: float | None = 5.0,
    routed: bool = True,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Arguments:
    """Normal q, k, v, and factors whose products have deviation 2: logits and biases of 1 to 5, some beyond a limit."""
    normal = _normals(seed, device)
    keys = queries if keys is None else keys
    factor_dtype = dtype if factor_dtype is None else factor_dtype
    arguments: Arguments = {
        "query": normal(batch, heads, queries, channels, dtype=dtype),
        "key": normal(batch, heads, keys, channels, dtype=dtype),
        "value": normal(batch, heads, keys, channels, dtype=dtype),
    }
    if routed:
        ranks = (rank, rank, rank, rank, gate_rank, gate_rank)
        factors = [
            normal(batch, rows, r, dtype=factor_dtype, scale=math.sqrt(2) * max(r, 1) ** -0.25)
            for rows, r in zip((queries, keys) * 3, ranks, strict=True)
        ]
        arguments["routing"] = RoutingFactors(*factors, limit)
    return arguments


def query_similarity_arguments(
    *, batch: int = 2, queries: int = 33, channels: int = 8, mode: str = "relu",
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Queries with a common part, as a decoder's have: cosines around 0.5."""
    normal = _normals(seed, device)
    x = normal(batch, queries, channels, dtype=torch.float64) + normal(batch, 1, channels, dtype=torch.float64)
    return {"x": x.detach().to(dtype).requires_grad_(mode == "mean"), "mode": mode}


def ms_deform_attn_arguments(
    *, levels: tuple[tuple[int, int], ...] = LEVELS, batch: int = 2, heads: int = 2, channels: int = 8,
    queries: int = 9, points: int = 2, counts: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32,
    point_dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Locations over and around the levels, positive weights that sum to 1; with `counts` packed, level after level."""
    normal = _normals(seed, device)
    point_dtype = dtype if point_dtype is None else point_dtype
    positions = sum(height * width for height, width in levels)
    shape = (batch, queries, heads, *((len(levels), points) if counts is None else (sum(counts),)))
    locations = 0.5 + 0.35 * normal(*shape, 2, dtype=torch.float64).detach()
    weights = normal(*shape, dtype=torch.float64).detach().flatten(3).softmax(-1).view(shape)
    arguments: Arguments = {
        "value": normal(batch, positions, heads, channels, dtype=dtype),
        "spatial_shapes": levels,
        "level_start_index": None,
        "sampling_locations": locations.to(point_dtype).requires_grad_(),
        "attention_weights": weights.to(point_dtype).requires_grad_(),
    }
    if counts is not None:
        arguments["points"] = counts
    return arguments


def ms_deform_attn_fused_arguments(
    *, levels: tuple[tuple[int, int], ...] = LEVELS, batch: int = 2, heads: int = 2, channels: int = 8,
    queries: int = 9, points: int = 2, coordinates: int = 2, reference_levels: int = 1, masked: bool = False,
    dtype: torch.dtype = torch.float32, point_dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """References inside the image, offsets of a few pixels (coordinates 2) or half boxes (coordinates 4)."""
    normal = _normals(seed, device)
    point_dtype = dtype if point_dtype is None else point_dtype
    positions, samples = sum(height * width for height, width in levels), len(levels) * points
    references = normal(batch, queries, reference_levels, coordinates, dtype=torch.float64).detach().sigmoid()
    offsets = 1.5 * normal(batch, queries, heads, samples, 2, dtype=torch.float64).detach()
    arguments = {
        "value": normal(batch, positions, heads, channels, dtype=dtype),
        "spatial_shapes": levels,
        "reference_points": references.to(point_dtype).requires_grad_(),
        "sampling_offsets": offsets.to(point_dtype).requires_grad_(),
        "attention_logits": normal(batch, queries, heads, samples, dtype=point_dtype),
    }
    if masked:
        arguments["value_mask"] = normal(batch, positions, dtype=torch.float32) > 0.8
    return arguments


def feed_forward_arguments(
    *, batch: int = 2, queries: int = 9, channels: int = 8, hidden: int = 16, activation: str = "relu", chunks: int = 4,
    biases: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Normal tokens; weights that keep their size, as an initialised layer's do."""
    normal = _normals(seed, device)
    return {
        "x": normal(batch, queries, channels, dtype=dtype),
        "w1": normal(hidden, channels, dtype=dtype, scale=max(channels, 1) ** -0.5),
        "b1": normal(hidden, dtype=dtype, scale=0.5) if biases else None,
        "w2": normal(channels, hidden, dtype=dtype, scale=max(hidden, 1) ** -0.5),
        "b2": normal(channels, dtype=dtype, scale=0.5) if biases else None,
        "activation": activation,
        "chunks": chunks,
    }


def add_linear_arguments(
    *, batch: int = 2, queries: int = 9, channels: int = 8, outputs: int = 12, positions: int = 1, bias: bool = True,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """Normal tokens and positions (of `positions` images)."""
    normal = _normals(seed, device)
    return {
        "x": normal(batch, queries, channels, dtype=dtype),
        "position": normal(positions, queries, channels, dtype=dtype),
        "weight": normal(outputs, channels, dtype=dtype, scale=max(channels, 1) ** -0.5),
        "bias": normal(outputs, dtype=dtype) if bias else None,
    }


def add_layer_norm_arguments(
    *, batch: int = 2, queries: int = 9, channels: int = 24, zeros: int = 0, keep: str = "output",
    dtype: torch.dtype = torch.float32, residual_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0,
) -> Arguments:  # fmt: skip
    """A normal residual, a smaller change to it, and weights around 1 as of a trained model; `zeros` of them are 0."""
    normal = _normals(seed, device)
    parameter_dtype = dtype if parameter_dtype is None else parameter_dtype
    weight = 1 + 0.3 * normal(channels, dtype=torch.float64).detach()
    weight[:zeros] = 0
    return {
        "x": normal(batch, queries, channels, dtype=dtype, scale=0.5),
        "residual": normal(batch, queries, channels, dtype=dtype if residual_dtype is None else residual_dtype),
        "weight": weight.to(device, parameter_dtype).requires_grad_(),
        "bias": normal(channels, dtype=parameter_dtype, scale=0.3),
        "keep": keep,
    }


def sigmoid_focal_loss_arguments(
    *, batch: int = 2, queries: int = 9, classes: int = 7, alpha: float = 0.25, gamma: float = 2.0,
    weighted: bool = False, reduction: str = "none", dtype: torch.dtype = torch.float32, device: str = "cpu",
    seed: int = 0,
) -> Arguments:  # fmt: skip
    """Logits as of a detector in training, most of them of low probability; a third of the queries have a target."""
    normal = _normals(seed, device)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3 * classes, (batch, queries), generator=generator).clamp(max=classes)
    arguments: Arguments = {
        "logits": (2 * normal(batch, queries, classes, dtype=torch.float64).detach() - 2).to(dtype).requires_grad_(),
        "targets": targets.to(device),
        "alpha": alpha,
        "gamma": gamma,
        "reduction": reduction,
    }
    if weighted:
        arguments["weight"] = torch.rand(batch, 1, generator=generator).to(device)
    return arguments


def sample_arguments(op: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls of a public op that together reach every argument; `sizes` go to the op's `*_arguments`.

    Raises:
        KeyError: the op has no samples: whoever adds an op adds them here.
    """
    return _SAMPLES[op](dtype, sizes)


def _routed_attention_samples(dtype: torch.dtype, sizes: dict[str, Any]) -> dict[str, Arguments]:
    def arguments(**options) -> Arguments:
        return routed_attention_arguments(dtype=dtype, **{**sizes, **options})

    every = arguments(keys=21)
    batch, heads, queries, _ = every["query"].shape
    keys = every["key"].shape[2]
    may_attend = torch.arange(keys) % 3 != torch.arange(queries).unsqueeze(1) % 3
    ranges = torch.tensor([[0, keys // 2], [keys - 3, keys]], dtype=torch.int32).repeat(queries, 1, 1)
    added = torch.randn(batch, heads, 1, keys, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {
        "routed": arguments(),
        "plain": arguments(routed=False),
        "unlimited, bool mask": {**arguments(keys=21, limit=None), "attn_mask": may_attend},
        "float mask, ranges, scale": {**every, "attn_mask": added, "key_ranges": ranges, "scale": 0.25},
    }


_SAMPLES: dict[str, Callable[[torch.dtype, dict[str, Any]], dict[str, Arguments]]] = {
    "routed_attention": _routed_attention_samples,
    "query_similarity": lambda dtype, sizes: {
        mode: query_similarity_arguments(mode=mode, dtype=dtype, **sizes) for mode in ("relu", "mean")
    },
    "ms_deform_attn": lambda dtype, sizes: {
        "default starts": ms_deform_attn_arguments(dtype=dtype, **sizes),
        "given starts": {**ms_deform_attn_arguments(dtype=dtype, **sizes), "level_start_index": (1, 23, 0)},
        "counts of points": ms_deform_attn_arguments(dtype=dtype, counts=(3, 1, 2), **sizes),
    },
    "ms_deform_attn_fused": lambda dtype, sizes: {
        "points": ms_deform_attn_fused_arguments(dtype=dtype, **sizes),
        "boxes, mask": ms_deform_attn_fused_arguments(
            dtype=dtype, coordinates=4, reference_levels=len(LEVELS), masked=True, **sizes
        ),
        "counts of points": {**ms_deform_attn_fused_arguments(dtype=dtype, **sizes), "points": (3, 1, 2)},
    },
    "feed_forward": lambda dtype, sizes: {
        "relu": feed_forward_arguments(dtype=dtype, **sizes),
        "gelu, no biases": feed_forward_arguments(dtype=dtype, activation="gelu", biases=False, **sizes),
    },
    "add_linear": lambda dtype, sizes: {
        "shared position": add_linear_arguments(dtype=dtype, **sizes),
        "a position of each image, no bias": add_linear_arguments(dtype=dtype, positions=2, bias=False, **sizes),
    },
    "add_layer_norm": lambda dtype, sizes: {
        "zero weights": add_layer_norm_arguments(dtype=dtype, zeros=4, **sizes),
        "normalized": add_layer_norm_arguments(dtype=dtype, zeros=9, keep="normalized", **sizes),
    },
    "sigmoid_focal_loss": lambda dtype, sizes: {
        "sum": sigmoid_focal_loss_arguments(dtype=dtype, reduction="sum", **sizes),
        "weights of images": sigmoid_focal_loss_arguments(dtype=dtype, gamma=1.5, alpha=0.6, weighted=True, **sizes),
    },
}


def _normals(seed: int, device: str) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        drawn = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    return normal
