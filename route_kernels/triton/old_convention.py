"""Entry points in the calling convention of the native schemas, over functions that have an older one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def kernel(op: str, direction: str) -> Callable:
    """The entry point of an op."""
    module = import_module(f".{op}", __package__)
    adapter = globals().get(f"_{op}_{direction}")
    return getattr(module, direction) if adapter is None else adapter(getattr(module, direction))


def _fill(outputs, found) -> None:
    for output, of in zip(outputs, found, strict=True):
        output.copy_(of)


def _factors(routing):
    if len(routing) > 6:
        raise NotImplementedError("triton: strength or limit as a tensor")
    return tuple(routing) if routing else (None,) * 6


def _routed_attention_forward(function):
    def forward(query, key, value, routing, attn_mask, key_ranges, scalars, output, lse):
        found = function(query, key, value, _factors(routing), scalars[2], attn_mask, key_ranges, scalars[0])
        _fill((output, lse), found)

    return forward


def _routed_attention_backward(function):
    def backward(grad_output, output, lse, query, key, value, routing, attn_mask, key_ranges, scalars, grads):
        saved = (grad_output, output, lse, query, key, value)
        _fill(grads, function(*saved, _factors(routing), scalars[2], attn_mask, key_ranges, scalars[0]))

    return backward


def _query_similarity_forward(function):
    return lambda x, output: output.copy_(function(x))


def _split(levels):
    count = len(levels) // 4
    return list(levels[: 2 * count]), tuple(levels[2 * count : 3 * count]), tuple(levels[3 * count :])


def _ms_deform_attn_forward(function):
    def forward(value, levels, locations, weights, output):
        sizes, starts, points = _split(levels)
        output.copy_(function(value, sizes, starts, locations, weights, points))

    return forward


def _ms_deform_attn_backward(function):
    def backward(grad_output, value, levels, locations, weights, deterministic, grads):
        sizes, starts, points = _split(levels)
        function(grad_output, value, sizes, starts, locations, weights, points, *grads)

    return backward


def _ms_deform_attn_fused_forward(function):
    def forward(value, levels, reference_points, offsets, logits, value_mask, output):
        sizes, starts, points = _split(levels)
        output.copy_(function(value, sizes, starts, reference_points, offsets, logits, points, value_mask))

    return forward


def _ms_deform_attn_fused_backward(function):
    def backward(grad_output, value, levels, references, offsets, logits, value_mask, deterministic, grads):
        sizes, starts, points = _split(levels)
        inputs = (value, sizes, starts, references, offsets, logits, points, value_mask)
        _fill(grads, function(grad_output, *inputs, len(grads) > 3))

    return backward


def _add_layer_norm_forward(function):
    def forward(x, residual, weight, bias, channels, eps, output, rstd, normalized):
        function(x, residual, weight, bias, eps, channels, output, rstd, normalized)

    return forward


def _add_layer_norm_backward(function):
    return lambda *inputs: function(*inputs[:-1], *inputs[-1])


_sigmoid_focal_loss_backward = _add_layer_norm_backward
