"""Inputs of `routed_attention` for tests and benchmarks."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...ops.routed_attention import RoutingFactors
from ..arguments import Arguments, empty, normals
from ..bad_inputs import bad_inputs, constant, mask, no_numbers, to, without_last


def arguments(
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
    normal = normals(seed, device)
    keys = queries if keys is None else keys
    factor_dtype = dtype if factor_dtype is None else factor_dtype
    given: Arguments = {
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
        given["routing"] = RoutingFactors(*factors, limit)
    return given


def samples(dtype: torch.dtype, **sizes: Any) -> dict[str, Arguments]:
    """By label, calls that together reach every argument."""

    def given(**options: Any) -> Arguments:
        return arguments(dtype=dtype, **{**sizes, **options})

    every = given(keys=21)
    batch, heads, queries, _ = every["query"].shape
    keys = every["key"].shape[2]
    may_attend = torch.arange(keys) % 3 != torch.arange(queries).unsqueeze(1) % 3
    ranges = torch.tensor([[0, keys // 2], [keys - 3, keys]], dtype=torch.int32).repeat(queries, 1, 1)
    added = torch.randn(batch, heads, 1, keys, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {
        "routed": given(),
        "plain": given(routed=False),
        "unlimited, bool mask": {**given(keys=21, limit=None), "attn_mask": may_attend},
        "float mask, ranges, scale": {**every, "attn_mask": added, "key_ranges": ranges, "scale": 0.25},
    }


SHAPES = {  # around tiles of 32 to 256 queries and keys, and around vectors of 2 to 16 lanes
    "one pair": dict(queries=1, keys=1, channels=1, rank=1, gate_rank=1, heads=1, batch=1),
    "one query": dict(queries=1, keys=300, channels=32, rank=16, gate_rank=3),
    "one key": dict(queries=33, keys=1, channels=5, rank=2, gate_rank=2),
    "31 x 32": dict(queries=31, keys=32, channels=2, rank=3, gate_rank=1, heads=3),
    "32 x 31": dict(queries=32, keys=31, channels=3, rank=5, gate_rank=4, heads=1),
    "33 x 255": dict(queries=33, keys=255, channels=7, rank=8, gate_rank=5),
    "32 x 256": dict(queries=32, keys=256, channels=16, rank=16, gate_rank=3),
    "63 x 129": dict(queries=63, keys=129, channels=10, rank=6, gate_rank=3),
    "64 x 128": dict(queries=64, keys=128, channels=11, rank=2, gate_rank=3, heads=3),
    "65 x 127": dict(queries=65, keys=127, channels=31, rank=17, gate_rank=3),
    "129 x 65": dict(queries=129, keys=65, channels=4, rank=4, gate_rank=3),
    "255 x 257": dict(queries=255, keys=257, channels=9, rank=7, gate_rank=3, batch=1),
    "256 x 33": dict(queries=256, keys=33, channels=15, rank=1, gate_rank=32, batch=1),
    "257 x 256": dict(queries=257, keys=256, channels=17, rank=9, gate_rank=2, batch=1, heads=1),
    "300 x 300": dict(queries=300, channels=32, rank=16, gate_rank=3, batch=1, heads=8),
    "long rows": dict(queries=40, keys=70, channels=128, rank=64, gate_rank=32),
    "uneven rows": dict(queries=5, keys=9, channels=127, rank=63, gate_rank=31, batch=3),
    "many keys": dict(queries=3, keys=800, channels=33, rank=4, gate_rank=1, batch=1),
    "plain, 45 x 270": dict(queries=45, keys=270, routed=False),
    "no limit, 45 x 270": dict(queries=45, keys=270, limit=None),
    "limit bites": dict(queries=45, keys=270, limit=0.3),
    "limit beyond reach": dict(queries=45, keys=270, limit=1e30),
}
SMALL_SHAPES = {  # tiles are 16 x 16 in Triton's interpreter, of two heads at a time
    "one pair": dict(queries=1, keys=1, channels=1, rank=1, gate_rank=1, heads=1, batch=1),
    "one query": dict(queries=1, keys=33, channels=32, rank=16),
    "one key": dict(queries=17, keys=1, channels=5, rank=2, gate_rank=2, batch=1),
    "15 x 16": dict(queries=15, keys=16, channels=16, rank=16, gate_rank=4, heads=1),
    "16 x 17, odd heads": dict(queries=16, keys=17, channels=17, rank=17, gate_rank=5, heads=3, batch=1),
    "33 x 15": dict(queries=33, keys=15, channels=31, rank=3, gate_rank=1, heads=5, batch=1),
    "long rows": dict(queries=5, keys=18, channels=128, rank=64, gate_rank=32, batch=1),
    "uneven rows": dict(queries=18, keys=5, channels=65, rank=33, gate_rank=31, batch=3, heads=1),
    "limit 0": dict(batch=1, queries=17, keys=18, limit=0.0),
    "limit bites": dict(batch=1, queries=17, keys=18, limit=0.3),
    "limit beyond reach": dict(batch=1, queries=17, keys=18, limit=1e30),
}
GRADCHECK = tuple(dict(queries=4, keys=3, channels=3, rank=2, gate_rank=2, limit=limit) for limit in (None, 0.8))
PER_QUERY = {"query": 2, "routing.sup_q": 1, "routing.del_q": 1, "routing.gate_q": 1, "output": 2}
MIXED = tuple(dict(rank=16, dtype=dtype, factor_dtype=torch.float32) for dtype in (torch.bfloat16, torch.float16))
EMPTY = empty(arguments, "batch", "heads", "queries", "keys", "rank", "gate_rank")
EMPTY["channels"] = lambda: {**arguments(channels=0), "scale": 0.5}
NUMBERS = {"scale": 0.375, "routing.limit": 0.5}
TINY = dict(batch=2, heads=2, queries=5, channels=4, rank=2, gate_rank=1)
DETECTOR = dict(batch=1, heads=8, channels=32, rank=16, gate_rank=3)
OF_WORKERS = dict(queries=200)
MANY = dict(batch=131_200, queries=64, heads=8, channels=32, rank=4)
MANY_GIGABYTES = 45
BAD_INPUTS = bad_inputs(
    "routed_attention",
    lambda: arguments(queries=5, keys=7),
    *no_numbers("scale", optional=True),
    *no_numbers("routing.limit", optional=True),
    (
        "of nothing",
        "routing",
        constant(RoutingFactors(*(None,) * 6)),
        TypeError,
        r"routing.sup_q: expected a tensor, got NoneType",
    ),
    ("a number", "routing.gate_q", constant(1.0), TypeError, r"routing.gate_q: expected a tensor, got float"),
    (
        "float8",
        "attn_mask",
        mask(5, 7, dtype=torch.float8_e5m2),
        TypeError,
        r"attn_mask: expected dtype .*, got .*8_e5m2",
    ),
    ("no tensor", "query", constant([1.0]), TypeError, r"query: expected a tensor, got list"),
    ("a list", "attn_mask", constant([True]), TypeError, r"attn_mask: expected a tensor, got list"),
    ("no tensor", "key", constant(None), TypeError, r"key: expected a tensor, got NoneType"),
    ("3 dimensions", "query", lambda q: q[0], ValueError, r"query: expected shape \[B, H, N, D\], got \[2, 5, 8\]"),
    ("other D", "key", without_last(3), ValueError, r"key: expected shape \[B=2, H=2, M, D=8\], got \[2, 2, 7, 7\]"),
    ("other H", "key", without_last(1), ValueError, r"key: expected shape \[B=2, H=2, M, D=8\], got \[2, 1, 7, 8\]"),
    ("other M", "value", without_last(2), ValueError, r"value: expected shape \[B=2, H=2, M=7, D=8\], got"),
    ("other B", "value", without_last(0), ValueError, r"value: expected shape \[B=2, H=2, M=7, D=8\], got"),
    ("integers", "query", to(torch.int64), TypeError, r"query: expected dtype .*float32.*, got torch.int64"),
    ("complex", "query", to(torch.complex64), TypeError, r"query: expected dtype .*, got torch.complex64"),
    ("other dtype", "key", to(torch.float64), TypeError, r"key: expected dtype torch.float32, got torch.float64"),
    ("other dtype", "value", to(torch.bfloat16), TypeError, r"value: expected dtype torch.float32, got torch.bf"),
    ("no D", "query", lambda q: q[..., :0], ValueError, r"key: expected shape \[B=2, H=2, M, D=0\], got"),
    ("a tuple", "routing", lambda r: tuple(r), TypeError, r"routing: expected RoutingFactors or None, got tuple"),
    ("no tensor", "routing.del_k", constant(None), TypeError, r"routing.del_k: expected a tensor, got NoneType"),
    ("other N", "routing.sup_q", without_last(1), ValueError, r"routing.sup_q: expected shape \[B=2, N=5, R\], got"),
    ("other M", "routing.sup_k", without_last(1), ValueError, r"routing.sup_k: expected shape \[B=2, M=7, R=4\]"),
    ("other R", "routing.sup_k", without_last(2), ValueError, r"routing.sup_k: expected shape \[B=2, M=7, R=4\]"),
    ("other N", "routing.del_q", without_last(1), ValueError, r"routing.del_q: expected shape \[B=2, N=5, R\]"),
    ("other B", "routing.del_k", without_last(0), ValueError, r"routing.del_k: expected shape \[B=2, M=7, R=4\]"),
    ("per head", "routing.gate_q", lambda g: g[:, None], ValueError, r"routing.gate_q: expected shape \[B=2, N=5, G\]"),
    ("other G", "routing.gate_k", without_last(2), ValueError, r"routing.gate_k: expected shape \[B=2, M=7, G=3\]"),
    ("other dtype", "routing.gate_k", to(torch.float16), TypeError, r"routing.gate_k: expected dtype torch.float32"),
    (
        "negative",
        "routing.limit",
        constant(-1.0),
        ValueError,
        r"routing.limit: expected a number >= 0 or None, got -1",
    ),
    ("NaN", "routing.limit", constant(float("nan")), ValueError, r"routing.limit: expected a number >= 0 or None"),
    ("integers", "attn_mask", mask(5, 7, dtype=torch.int32), TypeError, r"attn_mask: expected dtype bool or floating"),
    ("other M", "attn_mask", mask(5, 6), ValueError, r"attn_mask: expected a shape broadcastable to .*got \[5, 6\]"),
    ("other H", "attn_mask", mask(3, 5, 7), ValueError, r"attn_mask: .* \[B, H, N, M\] = \[2, 2, 5, 7\], got \[3, 5"),
    ("5 dimensions", "attn_mask", mask(1, 2, 2, 5, 7), ValueError, r"attn_mask: expected a shape broadcastable"),
    (
        "learnable",
        "attn_mask",
        lambda _: torch.zeros(5, 7, requires_grad=True),
        ValueError,
        r"attn_mask: .* requires_grad=False",
    ),
    ("int64", "key_ranges", mask(5, 2, 2, dtype=torch.int64), TypeError, r"key_ranges: expected dtype torch.int32"),
    ("other N", "key_ranges", mask(4, 2, 2, dtype=torch.int32), ValueError, r"key_ranges: expected shape \[N=5, 2, 2"),
    (
        "one interval",
        "key_ranges",
        mask(5, 2, dtype=torch.int32),
        ValueError,
        r"key_ranges: expected shape \[N=5, 2, 2",
    ),
    (
        "other B",
        "key_ranges",
        mask(3, 5, 2, 2, dtype=torch.int32),
        ValueError,
        r"key_ranges: expected shape \[B=2, N=5",
    ),
    (
        "elsewhere",
        "value",
        lambda v: v.detach().to("meta"),
        ValueError,
        r"value: expected on cpu like query, got .* meta",
    ),
)
