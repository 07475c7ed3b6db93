"""Dual-R-DETR (Route-DETR, arXiv 2512.13876): their QueryRouter and decoder self-attention as one fused call.

    report = apply(model)    # their decoder layers, with their parameters; nothing else changes

Their router writes out a bias [B * H, N, N], from a similarity [B, N, N], and self-attention takes it as `attn_mask`:

    attention(q, k, v, mask + lambda clamp(p sup + (1 - p) del, -5, 5))

Here the layer hands the bias to self-attention as factors, and `routed_attention` computes it tile by tile. lambda
scales what has been clamped, so it scales the limit as well as the factors.
B batch, N queries, C channels, H heads, D = C / H, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn

from ... import backends
from ...nn import routing_factors
from ...ops.query_similarity import query_similarity
from ...ops.routed_attention import OP, RoutingFactors, routed_attention, routing_bias
from ..codebase import (
    REPLACED_BY_OTHERS,
    UNKNOWN_DECORATOR,
    Report,
    applying,
    inside_decorators,
    replaced_by_others,
    revert_all,
)
from ..convention import TOLERANCE, arguments_of, autocast_difference, described, random_twin
from ..routing.self_attention import TorchMultiheadAttention

CODEBASE = "dual_r_detr"
LIMIT = 5.0
SMALLEST_AREA = 1e-6
ROUTER = (
    *("router_phi", "router_rank", "router_U_sup", "router_V_sup", "router_U_del", "router_V_del"),
    *("router_gamma_sup", "router_gamma_del", "selector_a", "selector_b"),
)
EXAMPLE_BATCH, EXAMPLE_QUERIES = 2, 5
EXAMPLE_NORM = 5.0
"""The norm of a query, so that some of the example's bias is clamped and some is not."""


def apply(model: nn.Module, *, verbose: bool = True) -> Report:
    """Fuse the router and the self-attention of every decoder layer of `model` that has both.

    Parameters and buffers are untouched: checkpoints load before and after. A layer that is called without gating
    (`gating_lambda` 0: the main branch, inference) runs its original code. A bool mask is a mask: theirs adds 1 to
    the logits of what it should hide.

    Args:
        model: holds decoder layers with `query_router` and `self_attn`; a wrapped one (DDP) will do.
        verbose: print the report.

    Returns:
        The report of what was replaced, what was left and why; it reverts, also as a context manager.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CODEBASE}.apply: model: expected a torch.nn.Module, got {type(model).__name__}")
    with applying(CODEBASE, verbose=verbose) as report:
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "query_router")}
        for name, layer in layers.items():
            name = name or type(layer).__name__
            reason = _reason_to_leave(layer)
            if reason is not None:
                report.leave(name, reason)
                continue
            attention = layer.self_attn
            report.replace_forward(layer, _routed, name=f"{name}.query_router", op="factors, query_similarity")
            attend = MethodType(forward, attention)  # which is pickled by the name of the function
            report.replace(attention, "forward", attend, name=f"{name}.self_attn", op=OP)
        if not layers:
            report.leave(type(model).__name__, "no module in it has a `query_router`")
    return report


def revert() -> None:
    """Put back everything that `apply` has replaced."""
    revert_all(CODEBASE)


def routed_layer(
    self: nn.Module,
    query: torch.Tensor,  # [B, N, C]
    query_pos: torch.Tensor | None,  # [B, N, C]
    reference_points: torch.Tensor,
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    self_attn_mask: torch.Tensor | None = None,  # [N, N] or [B * H, N, N]
    key_padding_mask: torch.Tensor | None = None,
    gating_lambda: float = 0.0,  # 0 or None is plain attention
    prev_class_logits: torch.Tensor | None = None,  # [B, N, classes] of the previous layer
    reference_boxes: torch.Tensor | None = None,  # [B, N, 4] as (cx, cy, w, h)
    *,
    original: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Their decoder layer, `original`, without its own gating: where it is asked for, factors stand for the mask."""
    if gating_lambda and gating_lambda > 0.0:
        with_position = self.with_pos_embed(query, query_pos)
        features = query_features(with_position, prev_class_logits, reference_boxes)
        self_attn_mask = RoutedMask(factors(self.query_router, with_position, features, gating_lambda), self_attn_mask)
    return original(
        self, query, query_pos, reference_points, value, spatial_shapes, level_start_index, self_attn_mask,
        key_padding_mask,
    )  # fmt: skip


def _routed(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return wraps(original)(lambda *arguments, **keywords: routed_layer(*arguments, original=original, **keywords))


class RoutedMask(NamedTuple):
    """Stands for `attn_mask`: the factors of the bias, and the mask that there was."""

    routing: RoutingFactors
    attn_mask: torch.Tensor | None  # [N, N] or [B * H, N, N]; bool (True may not attend) or floating (added)


def forward(
    self: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | RoutedMask | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`nn.MultiheadAttention.forward`; with a `RoutedMask`, self-attention with its bias, in one pass."""
    if not isinstance(attn_mask, RoutedMask):
        return type(self).forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    call = TorchMultiheadAttention.call(self, query, key, value, key_padding_mask, need_weights, attn_mask.attn_mask)
    attended = routed_attention(
        call.query, call.key, call.value, attn_mask.routing, attn_mask=call.attn_mask, scale=call.scale
    )
    return call.finish(attended.transpose(1, 2).flatten(2))


def query_features(
    query: torch.Tensor, prev_class_logits: torch.Tensor | None, reference_boxes: torch.Tensor | None
) -> torch.Tensor:
    """The gate's input x [B, N, 3], without gradient: similarity to the others, confidence, log of the box's area."""
    with torch.no_grad():
        similarity = query_similarity(query)
        confidence = geometry = torch.zeros_like(similarity)
        if prev_class_logits is not None:
            confidence = prev_class_logits.softmax(dim=-1).amax(dim=-1)
        if reference_boxes is not None and reference_boxes.shape[-1] >= 4:
            width, height = reference_boxes[..., 2:4].unbind(-1)
            geometry = (width * height).clamp(min=SMALLEST_AREA).log()
        return torch.stack([similarity, confidence, geometry], dim=-1)


def factors(router: nn.Module, query: torch.Tensor, features: torch.Tensor, strength: float) -> RoutingFactors:
    """The factors of strength * clamp(p gamma_sup D_sup + (1 - p) gamma_del D_del, -5, 5), by their router's layers.

    Args:
        router: their QueryRouter.
        query: [B, N, C], content and position summed.
        features: [B, N, 3], the gate's input.
        strength: lambda > 0.

    Returns:
        The factors of `route_kernels.nn.routing_factors`.
    """
    return routing_factors(router, query, features, rank=router.router_rank, limit=LIMIT, strength=strength)


def _reason_to_leave(layer: nn.Module) -> str | None:
    attention = getattr(layer, "self_attn", None)
    if replaced_by_others(layer):
        return REPLACED_BY_OTHERS
    _, *arguments, _ = arguments_of(routed_layer)
    if arguments_of(type(layer).forward)[1:] != arguments:
        return f"its forward does not take ({', '.join(arguments)})"
    if inside_decorators(type(layer).forward, _routed) is None:
        return UNKNOWN_DECORATOR
    if type(attention) is not nn.MultiheadAttention:
        return f"self_attn is no torch.nn.MultiheadAttention but {type(attention).__name__}"
    if replaced_by_others(attention):
        return f"self_attn: {REPLACED_BY_OTHERS}"
    if attention.dropout > 0:
        return f"self_attn has dropout {attention.dropout:g}, the fused attention none: set it to 0 (their config does)"
    plain = attention.batch_first and attention.in_proj_weight is not None and attention.bias_k is None
    if not plain or attention.add_zero_attn:
        return "self_attn is not batch-first with one input projection"
    return _difference(layer.query_router)


def _difference(router: nn.Module) -> str | None:
    """The reason why the factors are not the bias of `router` in an example; None where they are."""
    missing = [name for name in ROUTER if not hasattr(router, name)]
    if missing:
        return f"query_router is not the published one: it has no {', '.join(missing)}"
    if hasattr(type(router).forward, "__wrapped__"):
        return "query_router.forward is decorated, and the factors are made without it"
    twin = random_twin(router)
    if isinstance(twin, str):
        return f"query_router {twin}"
    generator = torch.Generator().manual_seed(0)
    channels = twin.router_phi[0].in_features
    query, features = (
        torch.randn(EXAMPLE_BATCH, EXAMPLE_QUERIES, size, generator=generator, dtype=torch.float64)
        for size in (channels, 3)
    )
    query *= EXAMPLE_NORM / math.sqrt(channels)
    with torch.no_grad():
        try:
            theirs = twin(query, *features.unbind(-1)).unflatten(0, (EXAMPLE_BATCH, -1))  # [B, H, N, N]
        except Exception as error:  # whatever somebody's module raises is the reason that is reported
            return f"query_router does not run on a small CPU example: {described(error)}"
        ours = routing_bias(factors(twin, query, features, 1.0)).unsqueeze(1)
    if not torch.allclose(ours.expand_as(theirs), theirs, rtol=TOLERANCE, atol=TOLERANCE):
        return "query_router computes another bias than the published one"
    device = next(router.parameters()).device
    twin.to(device, torch.float32)
    query, features = query.to(device, torch.float32), features.to(device, torch.float32)
    with backends.backend("reference"), torch.autocast(device.type):
        reason = autocast_difference(
            lambda: twin(query, *features.unbind(-1)).float().unflatten(0, (EXAMPLE_BATCH, -1)),
            lambda: routing_bias(factors(twin, query, features, 1.0)).float().unsqueeze(1),
            theirs,
        )
    return reason and f"query_router: {reason}"
