"""Routed attention in Triton: launches of the forward kernel and of the two passes of backward.

Called by `route_kernels.ops.routed_attention` with masks as views of [B, H, N, M] and [B, N, 2, 2], checked.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import launch
from .routed_attention_backward import attention_backward_keys, attention_backward_queries, sum_groups
from .routed_attention_forward import attention_forward
from .routed_attention_tile import BOOL_MASK, FLOAT_MASK, LOG2_E, NO_MASK
from .table import AMD, HALF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .variants import Variant

SUM_BLOCK = 1024
MOST_GATE_COLUMNS = 4  # of a gate in multiply-adds
STRIDES = (3, 3, 3, *(2,) * 6, 4, 1)  # of query, key, value, factors, mask and ranges that are no constants


def forward(query, key, value, factors, limit, attn_mask, key_ranges, scale):
    """O [B, H, N, D] and lse [B, H, N] float32, +inf where a query attends nothing."""
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    _, heads, queries, _ = query.shape
    if heads == 0:
        return output, lse
    masked = attn_mask is not None or key_ranges is not None
    settings = _settings("routed_attention_forward", query, key, factors, masked)
    grid = _grid(query, queries, settings, "BLOCK_N")
    inputs, constants = _inputs(query, key, value, factors, attn_mask, key_ranges)
    launch.launch(
        attention_forward, grid, *inputs.tensors, output, lse,
        heads, queries, key.shape[2], scale, _bound(limit), *inputs.strides,
        **constants, **settings,
    )  # fmt: skip
    return output, lse


def backward(grad_output, output, lse, query, key, value, factors, limit, attn_mask, key_ranges, scale):
    """Gradients of query, key, value and, where there are factors, of the six: the same bits every time.

    The pass over queries comes first: it writes T = dO . O, which the pass over keys reads.
    """
    grads = [x.new_empty(x.shape) for x in (query, key, value, *factors) if x is not None]
    if 0 in query.shape[:2]:  # no head: no program writes the factors' gradients
        return [grad.zero_() for grad in grads]
    output_dot = lse.new_empty(lse.shape)
    inputs, constants = _inputs(query, key, value, factors, attn_mask, key_ranges)
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2], scale, _bound(limit))
    strides = (*grad_output.stride()[:3], *inputs.strides)
    output, lse = output.contiguous(), lse.contiguous()
    masked = attn_mask is not None or key_ranges is not None

    settings = _settings("routed_attention_backward_queries", query, key, factors, masked)
    to_factors = _FactorGradients(grads[3::2], query.shape[1], settings)
    launch.launch(
        attention_backward_queries, _grid(query, query.shape[2], settings, "BLOCK_N"),
        grad_output, output, lse, *inputs.tensors, grads[0], *to_factors.parts, output_dot, *sizes, *strides,
        **constants, **settings,
    )  # fmt: skip
    to_factors.sum()

    settings = _settings("routed_attention_backward_keys", query, key, factors, masked)
    to_factors = _FactorGradients(grads[4::2], query.shape[1], settings)
    launch.launch(
        attention_backward_keys, _grid(query, key.shape[2], settings, "BLOCK_M"),
        grad_output, output_dot, lse, *inputs.tensors, grads[1], grads[2], *to_factors.parts, *sizes, *strides,
        **constants, **settings,
    )  # fmt: skip
    to_factors.sum()
    return grads


class _FactorGradients:
    """Where a pass writes the gradients of its three factors: in place, or [groups, ...] for `sum_groups` to add."""

    def __init__(self, grads: list[torch.Tensor], heads: int, settings: dict[str, int]):
        self.grads, self.groups = grads, launch.blocks(heads, settings["HEADS_PER_PROGRAM"])
        self.parts: list[torch.Tensor | None] = list(grads) or [None] * 3
        if grads and self.groups > 1:
            self.parts = [grad.new_empty((self.groups, *grad.shape), dtype=torch.float32) for grad in grads]

    def sum(self) -> None:
        if self.parts[0] is None or self.groups == 1:
            return
        sizes = [grad.numel() for grad in self.grads]
        grid = (launch.blocks(max(sizes), SUM_BLOCK), 3)
        launch.launch(sum_groups, grid, *self.parts, *self.grads, self.groups, *sizes, BLOCK=SUM_BLOCK, num_warps=4)


def _grid(query, rows: int, settings, block: str) -> tuple[int]:
    """Programs: blocks of rows, groups of heads, images; neighbours share an image's keys."""
    groups = launch.blocks(query.shape[1], settings["HEADS_PER_PROGRAM"])
    return (launch.blocks(rows, settings[block]) * groups * query.shape[0],)


def _settings(kernel_name: str, query, key, factors, masked: bool) -> dict[str, int]:
    """The table's, with the heads spread evenly over the programs: 5 heads in groups of at most 4 are 3 and 2."""
    _, heads, queries, channels = query.shape
    routed = factors[0] is not None
    settings = launch.config(
        kernel_name, query.device, query.dtype, H=heads, N=queries, M=key.shape[2], D=channels,
        R=max(factor.shape[-1] for factor in factors) if routed else 0, MASKED=2 if masked else 1,
        F=factors[0].element_size() if routed else query.element_size(),
    )  # fmt: skip
    groups = launch.blocks(heads, settings["HEADS_PER_PROGRAM"])
    return {**settings, "HEADS_PER_PROGRAM": launch.blocks(heads, groups)}


class _Inputs(NamedTuple):
    tensors: tuple
    strides: tuple[int, ...]


def _inputs(query, key, value, factors, attn_mask, key_ranges) -> tuple[_Inputs, dict[str, object]]:
    """What every kernel reads, and its constants."""
    mask_kind = NO_MASK
    if attn_mask is not None:
        mask_kind = BOOL_MASK if attn_mask.dtype == torch.bool else FLOAT_MASK
        attn_mask = attn_mask.view(torch.uint8) if mask_kind == BOOL_MASK else attn_mask
    tensors = (query, key, value, *factors, attn_mask, key_ranges)
    strides: list[int] = []
    for tensor, count in zip(tensors, STRIDES, strict=True):
        strides += (0,) * count if tensor is None else tensor.stride()[:count]
    routed, heads = factors[0] is not None, query.shape[1]
    constants = _constants(
        query.dtype, query.shape[3], tuple([factor.shape[-1] for factor in factors[::2]]) if routed else None,
        factors[0].dtype if routed else query.dtype, mask_kind,
        attn_mask is not None and heads > 1 and attn_mask.stride(1) != 0, key_ranges is not None,
        launch.input_precision(), launch.target(query.device),
    )  # fmt: skip
    return _Inputs(tensors, tuple(strides)), constants


@functools.lru_cache(maxsize=4096)
def _constants(
    dtype: torch.dtype, channels: int, ranks: tuple[int, ...] | None, factor_dtype: torch.dtype, mask_kind: int,
    mask_of_head: bool, ranges: bool, precision: str, target: str,
) -> dict[str, object]:  # fmt: skip
    """What the kernels are compiled for. Do not change the dictionary that comes back: it is kept."""
    sup_rank, del_rank, gate_rank = ranks or (0, 0, 0)
    # TF32 factors beside a short query are more exact than the logits they add to.
    factor_precision = "tf32" if dtype != factor_dtype else precision
    multiplied = factor_dtype == torch.float32 and factor_precision == "ieee" and target not in AMD
    return dict(
        ROUTED=ranks is not None, MASK=mask_kind, MASK_OF_HEAD=mask_of_head, RANGES=ranges,
        D=channels, SUP_RANK=sup_rank, DEL_RANK=del_rank, GATE_RANK=gate_rank,
        BLOCK_D=launch.padded(channels), BLOCK_SUP=launch.padded(sup_rank), BLOCK_DEL=launch.padded(del_rank),
        BLOCK_GATE=launch.padded(gate_rank),
        # Where `dot` has no tensor cores it would multiply the 16 columns that it pads to: see docs/triton.md.
        GATE_COLUMNS=gate_rank if multiplied and gate_rank <= MOST_GATE_COLUMNS else 0,
        PRECISION=precision, FACTOR_PRECISION=factor_precision,
        FAST_SIGMOID=dtype in HALF and target.startswith("sm"), UNITS=LOG2_E if dtype in HALF else 1.0,
    )  # fmt: skip


def _bound(limit: float | None) -> float:
    return math.inf if limit is None else limit


def variants(architecture: str) -> Iterator[Variant]:
    """Forward and backward for every dtype, D and mask: of a detector's shape, on tensors of the meta device."""
    from .variants import DTYPES, recorded

    for dtype in DTYPES["routed_attention"]:
        name = str(dtype).removeprefix("torch.")
        for channels in (16, 32, 64, 128):
            yield from _recorded(recorded, architecture, f"{name} D={channels}", dtype, channels)
        yield from _recorded(recorded, architecture, f"{name} D=48 R=64 G=32", dtype, 48, rank=64, gate_rank=32)
        yield from _recorded(recorded, architecture, f"{name} D=32 plain", dtype, 32, routed=False)
        yield from _recorded(recorded, architecture, f"{name} D=32 masked", dtype, 32, masked=True)
        if dtype in HALF:
            yield from _recorded(recorded, architecture, f"{name} D=32 float32 factors", dtype, 32, torch.float32)


def _recorded(recorded, architecture, label, dtype, channels, factor_dtype=None, rank=16, gate_rank=3, routed=True,
              masked=False):  # fmt: skip
    batch, heads, queries = 2, 8, 1100

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = (empty(batch, queries, heads, channels).transpose(1, 2) for _ in range(3))
    factors = (None,) * 6
    if routed:
        ranks = (rank, rank, rank, rank, gate_rank, gate_rank)
        factors = tuple(empty(batch, queries, r, dtype=factor_dtype or dtype) for r in ranks)
    mask = empty(queries, queries).expand(batch, heads, -1, -1) if masked else None
    ranges = empty(batch, queries, 2, 2, dtype=torch.int32) if masked else None
    output, lse = empty(batch, heads, queries, channels), empty(batch, heads, queries, dtype=torch.float32)
    call = (query, key, value, factors, 5.0, mask, ranges, 1.0)
    yield from recorded("routed_attention", "forward", label, architecture, lambda: forward(*call))
    yield from recorded(
        "routed_attention", "backward", label, architecture, lambda: backward(output, output, lse, *call)
    )
