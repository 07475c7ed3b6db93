"""Who else computes our ops on a GPU: the public code, the compiler, FlexAttention, and another backend of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import route_kernels as rk
from route_kernels.testing import EAGER, named_tensors

from .registry import Contender, Unavailable

FORMULA = EAGER["routed_attention"]
DTYPES = ((torch.bfloat16, "bf16"), (torch.float32, "f32"))
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` through torch.compile, made when it is first called."""

    @cache
    def made() -> Callable[..., Tensor]:
        return torch.compile(function, dynamic=False)

    return lambda **arguments: made()(**arguments)


def compiled_eager(op: str) -> Contender:
    """The op as PyTorch users write it, through torch.compile."""
    return Contender("eager, torch.compile", compiled(EAGER[op]), EAGER[op])


def on_backend(op: str, backend: str) -> Contender:
    """Our op on one of its backends, whichever is the fastest."""

    def call(**arguments: Any) -> Tensor:
        runs, reason = rk.can_run(op, backend, *(tensor for _, tensor in named_tensors(arguments)))
        if not runs:
            raise Unavailable(reason)
        with rk.backend(backend):
            return getattr(rk, op)(**arguments)

    return Contender(f"ours, {backend}", call, EAGER[op])


def public_code(query: Tensor, key: Tensor, value: Tensor, routing: rk.RoutingFactors) -> Tensor:
    """The form of Dual-R-DETR's QueryRouter and nn.MultiheadAttention: the bias repeated for every head."""
    bias = _bias(routing).to(query.dtype)
    repeated = bias.repeat_interleave(query.shape[1], dim=0)  # [B H, N, M]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=repeated.unflatten(0, query.shape[:2]))


def _bias(routing: rk.RoutingFactors) -> Tensor:
    """[B, N, M]"""
    p = torch.sigmoid(routing.gate_q @ routing.gate_k.mT)
    r = p * (routing.sup_q @ routing.sup_k.mT) + (1 - p) * (routing.del_q @ routing.del_k.mT)
    return r.clamp(-routing.limit, routing.limit)


def factored_score_mod(routing: rk.RoutingFactors) -> ScoreMod:
    """The bias of one pair from its factors; FlexAttention adds up their gradients by atomics."""
    sup_q, sup_k, del_q, del_k, gate_q, gate_k = (_Rows(factor) for factor in routing[:6])
    limit = routing.limit

    def product(of_query: _Rows, of_key: _Rows, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        total = of_query.at(b, i, 0) * of_key.at(b, j, 0)
        for r in range(1, of_query.rank):  # a score_mod may not reduce
            total = total + of_query.at(b, i, r) * of_key.at(b, j, r)
        return total

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = torch.sigmoid(product(gate_q, gate_k, b, i, j))
        delegated = product(del_q, del_k, b, i, j)
        r = delegated + p * (product(sup_q, sup_k, b, i, j) - delegated)
        return score + torch.clamp(r, -limit, limit)

    return score_mod


class _Rows:
    """A factor [B, N, R] as FlexAttention can differentiate it: contiguous, every index a tensor."""

    def __init__(self, factor: Tensor) -> None:
        _, self.rows, self.rank = factor.shape
        self.flat = factor.reshape(-1)

    def at(self, b: Tensor, row: Tensor, r: int) -> Tensor:
        return self.flat[(b * self.rows + row) * self.rank + r]


def looked_up_score_mod(bias: Tensor) -> ScoreMod:
    """The bias of one pair out of a [B, N, M] that was written out before."""
    return lambda score, b, h, i, j: score + bias[b, i, j]


def _flex(score_mod_of: Callable[[Any], ScoreMod]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, captured: Any) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, score_mod=score_mod_of(captured))

    return attend


def flex_factored(query: Tensor, key: Tensor, value: Tensor, routing: rk.RoutingFactors) -> Tensor:
    """Factors in float32: sums by atomics in bfloat16 would be wrong."""
    factors = rk.RoutingFactors(*(factor.float() for factor in routing[:6]), *routing[6:])
    return _compiled_factored(query=query, key=key, value=value, captured=factors)


def flex_looked_up(query: Tensor, key: Tensor, value: Tensor, routing: rk.RoutingFactors) -> Tensor:
    """The bias in float32, for the same reason."""
    bias = _compiled_bias(routing=routing).float()
    return _compiled_looked_up(query=query, key=key, value=value, captured=bias)


_compiled_factored = compiled(_flex(factored_score_mod))
_compiled_looked_up = compiled(_flex(looked_up_score_mod))
_compiled_bias = compiled(_bias)

PUBLIC = Contender("public code", public_code, FORMULA)
COMPILED_PUBLIC = Contender("public code, torch.compile", compiled(public_code), FORMULA)
FLEX_FACTORED = Contender("FlexAttention, factors in score_mod", flex_factored, FORMULA)
FLEX_LOOKED_UP = Contender("FlexAttention, bias looked up", flex_looked_up, FORMULA)
