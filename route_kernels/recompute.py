"""Activation checkpointing that does not run again what is dear to compute and cheap to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import backends

_OPS = (*backends.OPS, *backends.PRODUCTS)
SAMPLED = ("ms_deform_attn", "ms_deform_attn_fused", "routed_attention")
"""Ops of this package whose outputs are kept by default: gathers and attention, not linear layers."""


def recomputed(function: Callable[..., Any], *inputs: Any, kept: Sequence[str] = SAMPLED, random: bool = False) -> Any:
    """`function(*inputs)`, of which backward computes again what it needs, from the inputs.

    Args:
        function: returns tensors; it must do the same when it is called again.
        inputs: what it is called with; they are kept.
        kept: ops of this package (their names) whose outputs are kept and not computed again. Their own backward
            gets what they keep, computed again; a projection before such an op costs its product once more.
        random: whether the function draws random numbers (dropout): the generators are then set back, which
            synchronises a GPU.

    Returns:
        The function's result; the gradients are the same. On backend `eager`, the baseline, nothing is computed
        again: it keeps what PyTorch keeps.
    """
    unknown = [kept] if isinstance(kept, str) else [name for name in kept if name not in _OPS]
    if unknown:
        raise ValueError(f"recomputed: kept: expected names out of {', '.join(_OPS)}, got {unknown[0]!r}")
    if not torch.is_grad_enabled() or backends.requested_backend() == "eager":
        return function(*inputs)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, partial(_policy, frozenset(kept)))}
    run = partial(_on_backend, backends.requested_backend(), function)
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=random, **(contexts if kept else {}))


def _on_backend(requested: str | None, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` with the request of its first run: autograd computes again in a thread of its own."""
    if backends.requested_backend() == requested:  # always so where a graph is compiled, which takes no block here
        return function(*inputs)
    with backends.backend(requested):
        return function(*inputs)


def _policy(kept: frozenset[str], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = op._schema.name.partition("::")
    is_kept = namespace == "route_kernels" and name in kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
