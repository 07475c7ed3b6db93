"""Self-attention modules of other codebases: their projections and masks, in the terms of `routed_attention`.

B batch, H heads, N queries, C channels, D channels of one head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttentionCall(NamedTuple):
    """One call of a foreign self-attention, up to the attention itself."""

    content: Tensor  # [B, N, C], what the values are made of
    positioned: Tensor  # [B, N, C], what queries and keys are made of: content with position
    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, H, N, D]
    value: Tensor  # [B, H, N, D]
    attn_mask: Tensor | None  # broadcastable to [B, H, N, N], True = may attend
    scale: float
    finish: Callable[[Tensor], Any]  # attended [B, N, H D] -> what the module returns
    groups: int = 1  # of queries that a batch row was split into


class SelfAttentionKind:
    """The common form of the modules of one kind.

    Attributes:
        description: which modules these are, for messages.
        has: attributes of such a module, dotted where they are of a part.
        takes: the arguments of its forward, without keywords of any name.
        channels, dropped: the attributes with C and with the dropout on attention weights.
    """

    description: str
    has: tuple[str, ...]
    takes: tuple[str, ...]
    channels: str
    dropped: str

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether `module` is of this kind."""
        if not all(_has(module, name) for name in cls.has):
            return False
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD) == cls.takes

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """Why this very module cannot be routed, or None."""
        return None

    @classmethod
    def embed_dim(cls, module: nn.Module) -> int:
        """C."""
        return attrgetter(cls.channels)(module)

    @classmethod
    def dropout(cls, module: nn.Module) -> tuple[str, float]:
        """Name and rate of the dropout on attention weights."""
        return cls.dropped, attrgetter(cls.dropped)(module)

    @staticmethod
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> SelfAttentionCall:
        """The call with the arguments of the module's own forward."""
        raise NotImplementedError


class TorchMultiheadAttention(SelfAttentionKind):
    """`nn.MultiheadAttention`: bool masks say where a query may NOT attend; float masks are added."""

    description = "torch.nn.MultiheadAttention"
    channels, dropped = "embed_dim", "dropout"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @staticmethod
    def refusal(module: nn.MultiheadAttention) -> str | None:
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn add keys that are no queries"
        return None

    @staticmethod
    def call(
        module: nn.MultiheadAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> SelfAttentionCall:
        if need_weights:
            raise _no_weights("need_weights=True")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected a mask where is_causal=True says that it is causal, got None")
        if not module.batch_first:
            query, key, value = (x.transpose(0, 1) if x.dim() == 3 else x for x in (query, key, value))
        _expect_self_attention(query, key, value)
        if module._qkv_same_embed_dim:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        heads = [
            F.linear(x, weight, bias).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]

        def finish(attended: Tensor) -> tuple[Tensor, None]:
            output = module.out_proj(attended)
            return (output if module.batch_first else output.transpose(0, 1)), None

        mask = _may_attend(attn_mask, key_padding_mask, heads[0].shape)
        return SelfAttentionCall(value, query, *heads, mask, module.head_dim**-0.5, finish)


class ProjectedSelfAttention(SelfAttentionKind):
    """transformers >= 5: q_proj, k_proj, v_proj, o_proj on hidden_states + position_embeddings (not for values)."""

    description = "transformers' *SelfAttention (q_proj, k_proj, v_proj, o_proj)"
    has = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")
    takes = ("hidden_states", "attention_mask", "position_embeddings")
    channels, dropped = "q_proj.in_features", "attention_dropout"

    @staticmethod
    def call(
        module: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> SelfAttentionCall:
        _expect_no_attentions(module, kwargs)
        if position_embeddings is not None and not isinstance(position_embeddings, Tensor):
            raise TypeError(
                "position_embeddings: expected a tensor to add to hidden_states or None, "
                f"got {type(position_embeddings).__name__}"
            )
        positioned = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        heads = (
            _heads(projected, module.head_dim)
            for projected in (module.q_proj(positioned), module.k_proj(positioned), module.v_proj(hidden_states))
        )
        return SelfAttentionCall(
            hidden_states, positioned, *heads, attention_mask, module.scaling, lambda x: (module.o_proj(x), None)
        )


class GroupedSelfAttention(SelfAttentionKind):
    """transformers' LW-DETR and RF-DETR: as above, and in training the queries fall into `group_detr` groups."""

    description = "transformers' LwDetrAttention, RfDetrAttention"
    has = (*ProjectedSelfAttention.has, "config.group_detr")
    takes = ("hidden_states", "position_embeddings")
    channels, dropped = ProjectedSelfAttention.channels, ProjectedSelfAttention.dropped

    @staticmethod
    def call(
        module: nn.Module, hidden_states: Tensor, position_embeddings: Tensor | None = None, **kwargs: Any
    ) -> SelfAttentionCall:
        groups, batch = module.config.group_detr if module.training else 1, len(hidden_states)
        content = groups_as_batch(hidden_states, groups)
        if position_embeddings is not None:
            position_embeddings = groups_as_batch(position_embeddings.expand_as(hidden_states), groups)
        call = ProjectedSelfAttention.call(module, content, None, position_embeddings, **kwargs)

        def finish(attended: Tensor) -> tuple[Tensor, None]:
            return torch.cat(module.o_proj(attended).split(batch), 1), None

        return call._replace(finish=finish, groups=groups)


class ConditionalSelfAttention(SelfAttentionKind):
    """transformers' Conditional DETR decoder: content and position have projections of their own, then are added."""

    description = "transformers' ConditionalDetrDecoderSelfAttention"
    has = ("q_content_proj", "q_pos_proj", "k_content_proj", "k_pos_proj", "v_proj", "o_proj", "head_dim")
    takes = ("hidden_states", "query_position_embeddings", "attention_mask")
    channels, dropped = "q_content_proj.in_features", ProjectedSelfAttention.dropped

    @staticmethod
    def call(
        module: nn.Module,
        hidden_states: Tensor,
        query_position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SelfAttentionCall:
        _expect_no_attentions(module, kwargs)
        query = module.q_content_proj(hidden_states) + module.q_pos_proj(query_position_embeddings)
        key = module.k_content_proj(hidden_states) + module.k_pos_proj(query_position_embeddings)
        heads = (_heads(projected, module.head_dim) for projected in (query, key, module.v_proj(hidden_states)))
        return SelfAttentionCall(
            hidden_states, hidden_states + query_position_embeddings, *heads, attention_mask, module.scaling,
            lambda x: (module.o_proj(x), None),
        )  # fmt: skip


class QueriesKeysValues(SelfAttentionKind):
    """transformers' Grounding DINO and OmDet-Turbo: query, key, value and out_proj, positions added by the caller.

    Their decoder layers always ask for attention weights and unpack two results: the second is None here.
    """

    description = "transformers' GroundingDino-, MMGroundingDino- and OmDetTurboMultiheadAttention"
    has = ("query", "key", "value", "out_proj", "attention_head_size")
    takes = ("queries", "keys", "values", "attention_mask", "output_attentions")
    channels, dropped = "query.in_features", "dropout.p"

    @staticmethod
    def call(
        module: nn.Module,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> SelfAttentionCall:
        _expect_self_attention(queries, keys, values)
        if attention_mask is not None and not attention_mask.is_floating_point():
            raise TypeError(
                f"attention_mask: expected a floating mask, which this module adds, got {attention_mask.dtype}"
            )
        heads = (
            _heads(projected, module.attention_head_size)
            for projected in (module.query(queries), module.key(keys), module.value(values))
        )

        def finish(attended: Tensor) -> tuple[Tensor] | tuple[Tensor, None]:
            output = module.out_proj(attended)
            return (output, None) if output_attentions else (output,)

        return SelfAttentionCall(values, queries, *heads, attention_mask, module.attention_head_size**-0.5, finish)


KINDS = (
    TorchMultiheadAttention,
    ProjectedSelfAttention,
    GroupedSelfAttention,
    ConditionalSelfAttention,
    QueriesKeysValues,
)


def kind_of(module: nn.Module) -> type[SelfAttentionKind] | None:
    """The kind of self-attention that `module` is, or None."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def groups_as_batch(x: Tensor, groups: int) -> Tensor:
    """[B, G N, ...] -> [G B, N, ...], as LW-DETR lays its groups out."""
    return torch.cat(x.chunk(groups, 1)) if groups > 1 else x


def _has(module: object, dotted: str) -> bool:
    try:
        attrgetter(dotted)(module)
    except AttributeError:
        return False
    return True


def _heads(projected: Tensor, channels: int) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]."""
    return projected.unflatten(-1, (-1, channels)).transpose(1, 2)


def _expect_self_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3:
        raise ValueError(f"query: expected a batch of three dimensions inside rk.routing, got {list(query.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name}: routing is for self-attention: expected batch and length {list(query.shape[:2])} "
                f"as of query, got {list(x.shape[:2])}"
            )


def _no_weights(asked: str) -> ValueError:
    return ValueError(f"{asked}: routed attention has no attention weights to return; ask for them outside rk.routing")


def _expect_no_attentions(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise _no_weights("output_attentions=True")


def _may_attend(attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The masks of `nn.MultiheadAttention` (True = may NOT attend) as one of `routed_attention` (True = may attend)."""
    batch, heads, queries, _ = shape
    masks = []
    if attn_mask is not None:
        _expect_mask("attn_mask", attn_mask, (queries, queries), (batch * heads, queries, queries))
        masks.append(attn_mask.unflatten(0, (batch, heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        _expect_mask("key_padding_mask", key_padding_mask, (batch, queries))
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        forbidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~forbidden
    return masks[0] if len(masks) == 1 else _added(masks[0]) + _added(masks[1])


def _expect_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected dtype bool or floating, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(str(list(s)) for s in shapes)}, got {list(mask.shape)}")


def _added(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, -torch.inf)
