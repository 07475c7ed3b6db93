"""Inputs that break the contract of an op, and the one error that each must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..ops.routed_attention import RoutingFactors
from .arguments import Arguments
from .samples import (
    add_layer_norm_arguments,
    add_linear_arguments,
    feed_forward_arguments,
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    query_similarity_arguments,
    routed_attention_arguments,
    sigmoid_focal_loss_arguments,
)

Row = tuple[str, str, Callable[[Any], Any], type[Exception], str]
"""Name of the case, argument, what is done to it, error and message."""


class BadInput(NamedTuple):
    """A call of `op` that is right but for one argument."""

    op: str
    name: str
    arguments: Callable[[], Arguments]
    error: type[Exception]
    message: str  # regular expression: names the argument, what was expected, what came


_GOOD: dict[str, Callable[[], Arguments]] = {
    "routed_attention": lambda: routed_attention_arguments(queries=5, keys=7),
    "query_similarity": lambda: query_similarity_arguments(queries=5),
    "ms_deform_attn": ms_deform_attn_arguments,
    "ms_deform_attn with points": lambda: ms_deform_attn_arguments(counts=(3, 1, 2)),
    "ms_deform_attn_fused": lambda: ms_deform_attn_fused_arguments(masked=True),
    "feed_forward": feed_forward_arguments,
    "add_linear": add_linear_arguments,
    "add_layer_norm": add_layer_norm_arguments,
    "sigmoid_focal_loss": lambda: sigmoid_focal_loss_arguments(weighted=True),
}


def _changed(sample: str, argument: str, change: Callable[[Any], Any]) -> Callable[[], Arguments]:
    """The good arguments with `change` applied to one of them; "routing.sup_q" is a field of `routing`."""

    def arguments() -> Arguments:
        good = _GOOD[sample]()
        name, _, field = argument.partition(".")
        if field:
            good[name] = good[name]._replace(**{field: change(getattr(good[name], field))})
        else:
            good[name] = change(good.get(name))
        return good

    return arguments


def _to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.detach().to(dtype)


def _without_last(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _mask(*shape: int, dtype: torch.dtype = torch.bool) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.ones(shape, dtype=dtype)


_VALUE, _TYPE = ValueError, TypeError


def _no_numbers(argument: str, optional: bool = False) -> tuple[Row, ...]:
    """Values that none of the ops' numbers may have."""
    rows = (
        ("a text", argument, _constant("0.5"), _TYPE, rf"{argument}: expected a number, got '0.5'"),
        ("a bool", argument, _constant(True), _TYPE, rf"{argument}: expected a number, got True"),
        (
            "a bool tensor",
            argument,
            lambda _: torch.tensor(True),
            _TYPE,
            rf"{argument}: expected a number, got a tensor .*torch.bool",
        ),
        ("a complex number", argument, _constant(0.5j), _TYPE, rf"{argument}: expected a number, got complex"),
        (
            "a vector",
            argument,
            lambda _: torch.ones(1),
            _TYPE,
            rf"{argument}: expected a number, got a tensor of shape \[1\] and",
        ),
        (
            "with gradient",
            argument,
            lambda _: torch.tensor(0.5, requires_grad=True),
            _TYPE,
            rf"{argument}: expected no gradient, got a tensor that requires one",
        ),
        (
            "huge",
            argument,
            _constant(10**400),
            _VALUE,
            rf"{argument}: expected a number that a float can hold, got an int of 1329 bits",
        ),
    )
    return rows if optional else (("none", argument, _constant(None), _TYPE, f"{argument}: .* got NoneType"), *rows)


def _no_integers(argument: str, around: Callable[[Any], Any] = lambda number: number) -> tuple[Row, ...]:
    """Values that none of the ops' integers may have; `around` puts one where the argument has it."""
    return (
        ("none in it", argument, _constant(around(None)), _TYPE, f"{argument}: expected ints, got NoneType"),
        ("a text in it", argument, _constant(around("2")), _TYPE, f"{argument}: expected ints, got '2'"),
        ("a bool in it", argument, _constant(around(True)), _TYPE, f"{argument}: expected ints, got True"),
        ("a fraction in it", argument, _constant(around(2.5)), _TYPE, f"{argument}: expected ints, got 2.5"),
        (
            "2^63 in it",
            argument,
            _constant(around(2**63)),
            _VALUE,
            f"{argument}: .* got .*9223372036854775808",
        ),
        ("2^99 in it", argument, _constant(around(2**99)), _VALUE, f"{argument}: .* got an int of 100 bits"),
        (
            "-2^64 in it",
            argument,
            _constant(around(-(2**64))),
            _VALUE,
            f"{argument}: .* got an int of 65 bits",
        ),
    )


_TABLE: dict[str, tuple[Row, ...]] = {
    "routed_attention": (
        *_no_numbers("scale", optional=True),
        *_no_numbers("routing.limit", optional=True),
        (
            "of nothing",
            "routing",
            _constant(RoutingFactors(*(None,) * 6)),
            _TYPE,
            r"routing.sup_q: expected a tensor, got NoneType",
        ),
        ("a number", "routing.gate_q", _constant(1.0), _TYPE, r"routing.gate_q: expected a tensor, got float"),
        (
            "float8",
            "attn_mask",
            _mask(5, 7, dtype=torch.float8_e5m2),
            _TYPE,
            r"attn_mask: expected dtype .*, got .*8_e5m2",
        ),
        ("no tensor", "query", _constant([1.0]), _TYPE, r"query: expected a tensor, got list"),
        ("a list", "attn_mask", _constant([True]), _TYPE, r"attn_mask: expected a tensor, got list"),
        ("no tensor", "key", _constant(None), _TYPE, r"key: expected a tensor, got NoneType"),
        ("3 dimensions", "query", lambda q: q[0], _VALUE, r"query: expected shape \[B, H, N, D\], got \[2, 5, 8\]"),
        ("other D", "key", _without_last(3), _VALUE, r"key: expected shape \[B=2, H=2, M, D=8\], got \[2, 2, 7, 7\]"),
        ("other H", "key", _without_last(1), _VALUE, r"key: expected shape \[B=2, H=2, M, D=8\], got \[2, 1, 7, 8\]"),
        ("other M", "value", _without_last(2), _VALUE, r"value: expected shape \[B=2, H=2, M=7, D=8\], got"),
        ("other B", "value", _without_last(0), _VALUE, r"value: expected shape \[B=2, H=2, M=7, D=8\], got"),
        ("integers", "query", _to(torch.int64), _TYPE, r"query: expected dtype .*float32.*, got torch.int64"),
        ("complex", "query", _to(torch.complex64), _TYPE, r"query: expected dtype .*, got torch.complex64"),
        ("other dtype", "key", _to(torch.float64), _TYPE, r"key: expected dtype torch.float32, got torch.float64"),
        ("other dtype", "value", _to(torch.bfloat16), _TYPE, r"value: expected dtype torch.float32, got torch.bf"),
        ("no D", "query", lambda q: q[..., :0], _VALUE, r"key: expected shape \[B=2, H=2, M, D=0\], got"),
        ("a tuple", "routing", lambda r: tuple(r), _TYPE, r"routing: expected RoutingFactors or None, got tuple"),
        ("no tensor", "routing.del_k", _constant(None), _TYPE, r"routing.del_k: expected a tensor, got NoneType"),
        ("other N", "routing.sup_q", _without_last(1), _VALUE, r"routing.sup_q: expected shape \[B=2, N=5, R\], got"),
        ("other M", "routing.sup_k", _without_last(1), _VALUE, r"routing.sup_k: expected shape \[B=2, M=7, R=4\]"),
        ("other R", "routing.sup_k", _without_last(2), _VALUE, r"routing.sup_k: expected shape \[B=2, M=7, R=4\]"),
        ("other N", "routing.del_q", _without_last(1), _VALUE, r"routing.del_q: expected shape \[B=2, N=5, R\]"),
        ("other B", "routing.del_k", _without_last(0), _VALUE, r"routing.del_k: expected shape \[B=2, M=7, R=4\]"),
        ("per head", "routing.gate_q", lambda g: g[:, None], _VALUE, r"routing.gate_q: expected shape \[B=2, N=5, G\]"),
        ("other G", "routing.gate_k", _without_last(2), _VALUE, r"routing.gate_k: expected shape \[B=2, M=7, G=3\]"),
        ("other dtype", "routing.gate_k", _to(torch.float16), _TYPE, r"routing.gate_k: expected dtype torch.float32"),
        (
            "negative",
            "routing.limit",
            _constant(-1.0),
            _VALUE,
            r"routing.limit: expected a number >= 0 or None, got -1",
        ),
        ("NaN", "routing.limit", _constant(float("nan")), _VALUE, r"routing.limit: expected a number >= 0 or None"),
        ("integers", "attn_mask", _mask(5, 7, dtype=torch.int32), _TYPE, r"attn_mask: expected dtype bool or floating"),
        ("other M", "attn_mask", _mask(5, 6), _VALUE, r"attn_mask: expected a shape broadcastable to .*got \[5, 6\]"),
        ("other H", "attn_mask", _mask(3, 5, 7), _VALUE, r"attn_mask: .* \[B, H, N, M\] = \[2, 2, 5, 7\], got \[3, 5"),
        ("5 dimensions", "attn_mask", _mask(1, 2, 2, 5, 7), _VALUE, r"attn_mask: expected a shape broadcastable"),
        (
            "learnable",
            "attn_mask",
            lambda _: torch.zeros(5, 7, requires_grad=True),
            _VALUE,
            r"attn_mask: .* requires_grad=False",
        ),
        ("int64", "key_ranges", _mask(5, 2, 2, dtype=torch.int64), _TYPE, r"key_ranges: expected dtype torch.int32"),
        ("other N", "key_ranges", _mask(4, 2, 2, dtype=torch.int32), _VALUE, r"key_ranges: expected shape \[N=5, 2, 2"),
        (
            "one interval",
            "key_ranges",
            _mask(5, 2, dtype=torch.int32),
            _VALUE,
            r"key_ranges: expected shape \[N=5, 2, 2",
        ),
        (
            "other B",
            "key_ranges",
            _mask(3, 5, 2, 2, dtype=torch.int32),
            _VALUE,
            r"key_ranges: expected shape \[B=2, N=5",
        ),
        (
            "elsewhere",
            "value",
            lambda v: v.detach().to("meta"),
            _VALUE,
            r"value: expected on cpu like query, got .* meta",
        ),
    ),
    "query_similarity": (
        ("no tensor", "x", _constant([[1.0]]), _TYPE, r"x: expected a tensor, got list"),
        ("2 dimensions", "x", lambda x: x[0], _VALUE, r"x: expected shape \[B, N, C\], got \[5, 8\]"),
        ("integers", "x", _to(torch.int32), _TYPE, r"x: expected dtype .*, got torch.int32"),
        ("none", "mode", _constant(None), _VALUE, r"mode: expected one of relu, mean, got None"),
        ("unknown", "mode", _constant("max"), _VALUE, r"mode: expected one of relu, mean, got 'max'"),
    ),
    "ms_deform_attn": (
        *_no_integers("spatial_shapes", lambda size: ((5, 7), (3, size), (1, 1))),
        *_no_integers("level_start_index", lambda start: (0, start, 47)),
        (
            "none",
            "spatial_shapes",
            _constant(None),
            _TYPE,
            r"spatial_shapes: expected a tensor \[L, 2\] or .* got NoneType",
        ),
        ("no tensor", "value", _constant(None), _TYPE, r"value: expected a tensor, got NoneType"),
        ("3 dimensions", "value", lambda v: v[0], _VALUE, r"value: expected shape \[B, S, H, D\], got \[48, 2, 8\]"),
        ("too short", "value", _without_last(1), _VALUE, r"value: expected S = 48 positions, .* got 47"),
        ("integers", "value", _to(torch.int64), _TYPE, r"value: expected dtype .*, got torch.int64"),
        ("flat", "spatial_shapes", _constant((5, 7)), _VALUE, r"spatial_shapes: expected \(h, w\) pairs, got 5"),
        ("fractions", "spatial_shapes", _constant(((4.5, 2),)), _TYPE, r"spatial_shapes: expected ints, got 4.5"),
        ("negative", "spatial_shapes", _constant(((-1, 2),)), _VALUE, r"spatial_shapes: expected sizes >= 0, got \(-1"),
        ("other L", "level_start_index", _constant((0, 1)), _VALUE, r"level_start_index: expected L=3 starts .* got 2"),
        ("beyond value", "level_start_index", _constant((0, 40, 0)), _VALUE, r"level_start_index: .* S=48 .* start 40"),
        ("fractions", "level_start_index", _constant((0.5, 1, 2)), _TYPE, r"level_start_index: expected ints, got 0.5"),
        (
            "other H",
            "sampling_locations",
            _without_last(2),
            _VALUE,
            r"sampling_locations: expected shape \[B=2, N, H=2",
        ),
        ("other L", "sampling_locations", _without_last(3), _VALUE, r"sampling_locations: expected shape .*L=3, P, 2"),
        ("x alone", "sampling_locations", _without_last(5), _VALUE, r"sampling_locations: expected shape .*, 2\], got"),
        ("wider", "sampling_locations", _to(torch.float64), _TYPE, r"sampling_locations: expected dtype .*, got .*64"),
        ("other P", "attention_weights", _without_last(4), _VALUE, r"attention_weights: expected shape .*P=2\], got"),
        ("other N", "attention_weights", _without_last(1), _VALUE, r"attention_weights: expected shape \[B=2, N=9"),
        (
            "integers",
            "attention_weights",
            _to(torch.int64),
            _TYPE,
            r"attention_weights: expected dtype .*, got .*int64",
        ),
        (
            "not packed",
            "points",
            _constant((2, 2, 2)),
            _VALUE,
            r"sampling_locations: expected shape \[B=2, N, H=2, K, 2\], got \[2, 9, 2, 3, 2, 2\]",
        ),
        ("a number", "points", _constant(2), _TYPE, r"points: expected a sequence of ints, .* got int"),
        ("fractions", "points", _constant((2.5, 2, 2)), _TYPE, r"points: expected ints, got 2.5"),
    ),
    "ms_deform_attn with points": (
        *_no_integers("points", lambda count: (3, count, 2)),
        ("other L", "points", _constant((3, 3)), _VALUE, r"points: expected L=3 counts .*, got \[3, 3\]"),
        ("other K", "points", _constant((2, 2, 3)), _VALUE, r"points: expected counts >= 0 that sum to K=6, got"),
        ("negative", "points", _constant((8, -1, -1)), _VALUE, r"points: expected counts >= 0 that sum to K=6, got"),
        (
            "none",
            "points",
            _constant(None),
            _VALUE,
            r"sampling_locations: expected shape .*L=3, P, 2\], got \[2, 9, 2, 6, 2\]",
        ),
        (
            "packed, x alone",
            "sampling_locations",
            _without_last(4),
            _VALUE,
            r"sampling_locations: expected shape .*K, 2\], got",
        ),
        ("other K", "attention_weights", _without_last(3), _VALUE, r"attention_weights: expected shape .*K=6\], got"),
    ),
    "ms_deform_attn_fused": (
        *_no_integers("spatial_shapes", lambda size: ((size, 7), (3, 4), (1, 1))),
        *_no_integers("points", lambda count: (2, 2, count)),
        ("no tensor", "sampling_offsets", _constant(2.0), _TYPE, r"sampling_offsets: expected a tensor, got float"),
        ("other S", "value", _without_last(1), _VALUE, r"value: expected S = 48 positions, .* got 47"),
        (
            "3 coordinates",
            "reference_points",
            lambda r: r[..., [0, 1, 1]],
            _VALUE,
            r"reference_points: expected .*2 or 4",
        ),
        ("other L", "reference_points", lambda r: r.expand(-1, -1, 2, -1), _VALUE, r"reference_points: expected "),
        ("other N", "reference_points", _without_last(1), _VALUE, r"reference_points: expected shape \[B=2, N=9"),
        ("other H", "sampling_offsets", _without_last(2), _VALUE, r"sampling_offsets: expected shape \[B=2, N, H=2, K"),
        ("x alone", "sampling_offsets", _without_last(4), _VALUE, r"sampling_offsets: expected shape .*K, 2\], got"),
        ("other K", "attention_logits", _without_last(3), _VALUE, r"attention_logits: expected shape .*K=6\], got"),
        ("wider", "attention_logits", _to(torch.float64), _TYPE, r"attention_logits: expected dtype .*, got .*float64"),
        ("other L", "points", _constant((3, 3)), _VALUE, r"points: expected L=3 counts .*, got \[3, 3\]"),
        ("other K", "points", _constant((2, 2, 3)), _VALUE, r"points: expected counts >= 0 that sum to K=6, got"),
        ("negative", "points", _constant((8, -1, -1)), _VALUE, r"points: expected counts >= 0 that sum to K=6, got"),
        ("other S", "value_mask", _without_last(1), _VALUE, r"value_mask: expected shape \[B=2, S=48\], got \[2, 47\]"),
        ("bytes", "value_mask", _to(torch.uint8), _TYPE, r"value_mask: expected dtype torch.bool, got torch.uint8"),
    ),
    "feed_forward": (
        *_no_integers("chunks"),
        ("a list", "activation", _constant(["relu"]), _VALUE, r"activation: expected one of .*, got \['relu'\]"),
        ("none", "activation", _constant(None), _VALUE, r"activation: expected one of relu, gelu, silu, got None"),
        ("negative", "chunks", _constant(-3), _VALUE, r"chunks: expected a number >= 1, got -3"),
        ("no tensor", "x", _constant(1.0), _TYPE, r"x: expected a tensor, got float"),
        ("no dimensions", "x", lambda x: x[0, 0, 0], _VALUE, r"x: expected shape \[..., C\], got \[\]"),
        ("no tensor", "w2", _constant(None), _TYPE, r"w2: expected a tensor, got NoneType"),
        ("other C", "w1", _without_last(1), _VALUE, r"w1: expected shape \[F, C=8\], got \[16, 7\]"),
        ("other F", "w2", _without_last(1), _VALUE, r"w2: expected shape \[O, F=16\], got \[8, 15\]"),
        ("other F", "b1", _without_last(0), _VALUE, r"b1: expected shape \[F=16\], got \[15\]"),
        ("other O", "b2", _without_last(0), _VALUE, r"b2: expected shape \[O=8\], got \[7\]"),
        ("integers", "x", _to(torch.int64), _TYPE, r"x: expected dtype .*float32.*, got torch.int64"),
        ("other dtype", "w1", _to(torch.bfloat16), _TYPE, r"w1: expected dtype torch.float32, got torch.bfloat16"),
        ("other dtype", "b2", _to(torch.float64), _TYPE, r"b2: expected dtype torch.float32, got torch.float64"),
        ("unknown", "activation", _constant("tanh"), _VALUE, r"activation: expected one of relu, gelu, silu, got 'ta"),
        ("none", "chunks", _constant(0), _VALUE, r"chunks: expected a number >= 1, got 0"),
        ("elsewhere", "w2", lambda w: w.detach().to("meta"), _VALUE, r"w2: expected on cpu like x, got one on meta"),
    ),
    "add_linear": (
        ("no tensor", "bias", _constant(0), _TYPE, r"bias: expected a tensor, got int"),
        ("2 dimensions", "x", lambda x: x[0], _VALUE, r"x: expected shape \[B, N, C\], got \[9, 8\]"),
        ("other N", "position", _without_last(1), _VALUE, r"position: expected shape \[B or 1, N=9, C=8\], got"),
        (
            "other B",
            "position",
            lambda p: p.expand(3, -1, -1),
            _VALUE,
            r"position: expected shape \[B=2 or 1, N=9, C=8\], got \[3, 9, 8\]",
        ),
        ("other C", "weight", _without_last(1), _VALUE, r"weight: expected shape \[O, C=8\], got \[12, 7\]"),
        ("other O", "bias", _without_last(0), _VALUE, r"bias: expected shape \[O=12\], got \[11\]"),
        ("other dtype", "position", _to(torch.float16), _TYPE, r"position: expected dtype torch.float32, got torch.fl"),
        ("elsewhere", "weight", lambda w: w.detach().to("meta"), _VALUE, r"weight: expected on cpu like x, got .*meta"),
    ),
    "add_layer_norm": (
        *_no_numbers("eps"),
        ("NaN", "eps", _constant(float("nan")), _VALUE, r"eps: expected a number >= 0, got nan"),
        ("no tensor", "residual", _constant(None), _TYPE, r"residual: expected a tensor, got NoneType"),
        ("no dimensions", "x", lambda x: x[0, 0, 0], _VALUE, r"x: expected shape \[..., C\], got \[\]"),
        ("other N", "residual", _without_last(1), _VALUE, r"residual: expected shape \[2, 9, 24\] like x, got \[2, 8"),
        ("other C", "weight", _without_last(0), _VALUE, r"weight: expected shape \[C=24\], got \[23\]"),
        ("other C", "bias", _without_last(0), _VALUE, r"bias: expected shape \[C=24\], got \[23\]"),
        ("integers", "x", _to(torch.int32), _TYPE, r"x: expected dtype .*, got torch.int32"),
        ("shorter", "weight", _to(torch.bfloat16), _TYPE, r"weight: expected dtype torch.float32, got torch.bfloat16"),
        ("negative", "eps", _constant(-1e-5), _VALUE, r"eps: expected a number >= 0, got -1e-05"),
        ("unknown", "keep", _constant("input"), _VALUE, r"keep: expected one of output, normalized, got 'input'"),
        (
            "elsewhere",
            "bias",
            lambda b: b.detach().to("meta"),
            _VALUE,
            r"bias: expected on cpu like x, got one on meta",
        ),
    ),
    "sigmoid_focal_loss": (
        *_no_numbers("alpha"),
        *_no_numbers("gamma"),
        ("none", "reduction", _constant(None), _VALUE, r"reduction: expected one of sum, none, got None"),
        ("no tensor", "targets", _constant([1]), _TYPE, r"targets: expected a tensor, got list"),
        ("1 dimension", "logits", lambda x: x[0, 0], _VALUE, r"logits: expected shape \[..., N, K\], got \[7\]"),
        ("one-hot", "targets", lambda t: t[..., None].expand(-1, -1, 7), _VALUE, r"targets: expected shape \[2, 9\],"),
        ("integers", "logits", _to(torch.int64), _TYPE, r"logits: expected dtype .*, got torch.int64"),
        ("int32", "targets", _to(torch.int32), _TYPE, r"targets: expected dtype torch.int64, got torch.int32"),
        ("above 1", "alpha", _constant(1.5), _VALUE, r"alpha: expected a number from 0 to 1, got 1.5"),
        ("negative", "gamma", _constant(-2.0), _VALUE, r"gamma: expected a number >= 0, got -2.0"),
        ("other B", "weight", lambda w: w.expand(2, 8), _VALUE, r"weight: expected a shape broadcastable to \[2, 9\]"),
        ("integers", "weight", _to(torch.int64), _TYPE, r"weight: expected dtype .*, got torch.int64"),
        ("unknown", "reduction", _constant("mean"), _VALUE, r"reduction: expected one of sum, none, got 'mean'"),
    ),
}

BAD_INPUTS: tuple[BadInput, ...] = tuple(
    BadInput(op, f"{argument}: {name}", _changed(sample, argument, change), error, f"^{op}: {message}")
    for sample, rows in _TABLE.items()
    for op in (sample.split()[0],)
    for name, argument, change, error, message in rows
)
