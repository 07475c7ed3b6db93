"""Route-DETR's learned bias (arXiv 2512.13876) for the decoder of another codebase: plain attention plus a router."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ...nn import QueryRouter
from ...ops.query_similarity import query_similarity
from ...ops.routed_attention import routed_attention
from ..codebase import UNKNOWN_DECORATOR, Replaced, Report, inside_decorators, replaced_by_others
from .context import RoutingSettings, active_settings, in_unknown_recomputation
from .self_attention import KINDS, SelfAttentionKind, groups_as_batch, kind_of


class AddedRouting(Report):
    """The changes of `add_routing` to a model; `revert()` takes the routers out again.

    Attributes:
        routers: the new `QueryRouter` of each attention module, by the module's name.
        replaced, left: as `Report`.
    """

    def __init__(self) -> None:
        super().__init__("add_routing")
        self.routers: dict[str, QueryRouter] = {}
        self._modules: list[nn.Module] = []

    def revert(self) -> None:
        """Make the model what it was, without the routers' parameters; a second call does nothing.

        Raises:
            RuntimeError: other code has changed the class of a module since; nothing is changed then.
        """
        _detach(self._modules)
        self._modules.clear()
        self.routers.clear()

    def _attach(self, name: str, module: nn.Module, kind: type[SelfAttentionKind], router: QueryRouter) -> None:
        module.router = router
        module.__class__ = _routed_class(type(module), kind)
        self._modules.append(module)
        self.routers[name] = router
        self.replaced.append(Replaced(name, "routed_attention (inside rk.routing)"))


def add_routing(
    model: nn.Module, self_attn: str = "decoder.layers.*.self_attn", *, verbose: bool = True, **router_options: Any
) -> AddedRouting:
    """Give the self-attention modules of a decoder a router each; they use it inside `with rk.routing(...)` only.

    The routers become parameters of the model (`<name of the attention>.router.*`), in the dtype and on the device of
    the attention they belong to: call this before the optimizer, DDP or an EMA copy is made. Outside `rk.routing` the
    modules run their original code.

    Args:
        model: whose attention modules are `nn.MultiheadAttention` or self-attention modules of transformers.
        self_attn: shell pattern (`fnmatch`) of the modules' names from any dot on; "decoder.layers.[45].self_attn"
            matches `model.decoder.layers.4.self_attn`, the last two of six layers.
        verbose: print the report.
        router_options: rank, hidden_dim, gate_rank, limit and nonnegative of `route_kernels.nn.QueryRouter`.

    Returns:
        An `AddedRouting`, a `Report` with the new `routers`; `revert()` removes them.

    Raises:
        ValueError: nothing matches that can be routed (the message lists what could be), or a matched module drops
            attention weights: set its dropout to 0 first.
        TypeError: `model` is no module, `self_attn` no string, or a router option unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"add_routing: model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(self_attn, str):
        raise TypeError(f"add_routing: self_attn: expected a pattern of module names, got {type(self_attn).__name__}")
    added = AddedRouting()
    matched = {name: module for name, module in model.named_modules() if _matches(name, self_attn)}
    accepted = []
    for name, module in matched.items():
        reason = _refusal(model, name, module)
        if reason is None:
            _expect_no_dropout(name, module, kind_of(module))
            accepted.append((name, module, kind_of(module)))
        else:
            added.leave(name, reason)
    if not any(isinstance(module, _Routed) for module in matched.values()) and not accepted:
        raise ValueError(_nothing_to_route(model, self_attn, added))

    routers = [_router_beside(module, kind, router_options) for _, module, kind in accepted]
    for (name, module, kind), router in zip(accepted, routers, strict=True):
        added._attach(name, module, kind, router)
    if verbose:
        print(added)
    return added


def remove_routing(model: nn.Module) -> list[str]:
    """Take every router out of `model`, or of a copy of it (an EMA model, say), before it is saved or deployed.

    Returns:
        The names of the attention modules that had one.

    Raises:
        RuntimeError: other code has changed the class of a module since; nothing is changed then.
    """
    routed = {name: module for name, module in model.named_modules() if isinstance(module, _Routed)}
    _detach(list(routed.values()))
    return list(routed)


class _Routed:
    """Marks the classes that `_routed_class` makes."""

    _original: type[nn.Module]
    _kind: type[SelfAttentionKind]
    _has_routed = False  # so that a checkpoint that recomputes it must know whether it did


@cache
def _routed_class(original: type[nn.Module], kind: type[SelfAttentionKind]) -> type[nn.Module]:
    """`original` whose forward is the routed one inside `rk.routing`. Instances can be copied and pickled."""

    def __reduce_ex__(self, protocol):
        _, _, state, *_ = original.__reduce_ex__(self, 2)
        return _new_routed, (original, kind), state

    forward = inside_decorators(original.forward, _routed_or_original)
    namespace = {"_original": original, "_kind": kind, "forward": forward, "__reduce_ex__": __reduce_ex__}
    return type(f"Routed{original.__name__}", (_Routed, original), {**namespace, "__module__": __name__})


def _routed_or_original(original: Callable) -> Callable:
    @wraps(original)
    def forward(self, *args, **kwargs):
        if not torch.compiler.is_compiling():
            _expect_known_recomputation(self)
        settings = active_settings()
        if settings.is_plain:
            return original(self, *args, **kwargs)
        return _routed_forward(self, settings, args, kwargs)

    return forward


def _new_routed(original: type[nn.Module], kind: type[SelfAttentionKind]) -> nn.Module:
    routed_class = _routed_class(original, kind)
    return routed_class.__new__(routed_class)


def _routed_forward(module: Any, settings: RoutingSettings, args: tuple, kwargs: dict) -> Any:
    kind = module._kind
    if module.training:
        _expect_no_dropout(type(module).__name__, module, kind)
    if not torch.compiler.is_compiling():
        module._has_routed = True
    call = kind.call(module, *args, **kwargs)
    confidence, geometry = (
        None if feature is None else groups_as_batch(feature, call.groups)
        for feature in (settings.confidence, settings.geometry)
    )
    factors = module.router(
        call.positioned,
        similarity=query_similarity(call.content.detach()),
        confidence=confidence,
        geometry=geometry,
        strength=settings.strength,
    )
    attended = routed_attention(
        call.query, call.key, call.value, factors, attn_mask=call.attn_mask, scale=call.scale
    )  # [B, H, N, D]
    return call.finish(attended.transpose(1, 2).flatten(2))


def _expect_known_recomputation(module: Any) -> None:
    if module._has_routed and in_unknown_recomputation():
        raise RuntimeError(
            "rk.routing: a checkpointed forward is recomputed in backward, and whether it was routed is not known "
            "here; checkpoint with use_reentrant=False, context_fn=rk.routing.checkpoint_contexts"
        )


def _expect_no_dropout(name: str, module: nn.Module, kind: type[SelfAttentionKind]) -> None:
    attribute, rate = kind.dropout(module)
    if rate:
        raise ValueError(
            f"add_routing: {name}: {attribute}: expected 0, since routed attention drops no attention weights, "
            f"got {rate}; set it to 0"
        )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a matched module stays as it is, or None."""
    if isinstance(module, _Routed):
        return "already has a router"
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} is no self-attention that is known here"
    if replaced_by_others(module):
        return "its forward has been replaced by other code; add routing before that"
    if inside_decorators(type(module).forward, _routed_or_original) is None:
        return UNKNOWN_DECORATOR
    if hasattr(module, "router"):
        return "it has an attribute called router"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer skips it on its fast path"
    return kind.refusal(module)


def _nothing_to_route(model: nn.Module, pattern: str, added: AddedRouting) -> str:
    candidates = [
        f"  {name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if kind_of(module) is not None and _refusal(model, name, module) is None
    ]
    lines = [f"add_routing: self_attn: {pattern!r} matches no module that can be routed"]
    lines += [f"  {entry.name}: {entry.reason}" for entry in added.left]
    if candidates:
        lines += [f"attention modules of this {type(model).__name__} that can be:", *candidates]
    else:
        known = "; ".join(kind.description for kind in KINDS)
        lines += [f"this {type(model).__name__} has no attention module that can be; known are: {known}"]
    return "\n".join(lines)


def _router_beside(module: nn.Module, kind: type[SelfAttentionKind], options: dict[str, Any]) -> QueryRouter:
    weight = next(module.parameters())
    router = QueryRouter(kind.embed_dim(module), **options).to(weight.device, weight.dtype)
    return router.train(module.training)


def _detach(modules: list[nn.Module]) -> None:
    for module in modules:
        if _Routed not in type(module).__bases__:
            raise RuntimeError(
                f"add_routing: revert: the class of a {type(module).__name__} has been changed by other code since "
                "add_routing(); undo that first"
            )
    for module in modules:
        del module.router
        vars(module).pop("_has_routed", None)
        module.__class__ = type(module)._original
