"""transformers: deformable attention of fifteen model families on our ops.

    report = apply(model)        # this model only
    report = apply("rt_detr")    # every RT-DETR of this process, made before or after
    report = apply()             # every family of `FAMILIES`

An attention module gets the fused form: its linear layers' outputs go straight into `ms_deform_attn_fused`. A module
whose class has a forward of its own keeps that, and gets the plain form `ms_deform_attn` where it calls a core that can
be reached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from ...ops.ms_deform_attn import ms_deform_attn
from ...ops.ms_deform_attn_fused import ms_deform_attn_fused
from ..codebase import (
    FUSED,
    PLAIN,
    Report,
    applying,
    has_kernel,
    inside_decorators,
    outside_autocast,
    plain_or_original,
    revert_all,
)
from ..kernels import MultiScaleDeformableAttention

CODEBASE = "transformers"
DEFAULT_METHOD = "default"
"""The bilinear operator of the v2 families; others, like "discrete", are not what our ops compute."""

BOX_SCALE = 0.5
"""The part of a box's size that one offset of P points spans; `ms_deform_attn_fused` has it built in."""

_READ = ("hidden_states", "encoder_hidden_states", "reference_points", "spatial_shapes_list", "attention_mask")


def _plain_layer(original: Callable) -> Callable:
    @wraps(original)
    def forward(self: nn.Module, value: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
        if has_kernel(PLAIN, value):
            plain = partial(MultiScaleDeformableAttention.forward, self)
            return outside_autocast(plain, value, *arguments, **keywords)
        return original(self, value, *arguments, **keywords)

    return forward


def _plain_function(original: Callable) -> Callable:
    def multi_scale_deformable_attention(
        value: torch.Tensor,  # [B, S, H, D]
        value_spatial_shapes: torch.Tensor | Sequence[tuple[int, int]],
        sampling_locations: torch.Tensor,  # [B, N, H, L, P, 2]
        attention_weights: torch.Tensor,  # [B, N, H, L, P]
    ) -> torch.Tensor:
        samples = (sampling_locations, attention_weights)
        return outside_autocast(ms_deform_attn, value, value_spatial_shapes, None, *samples)

    return plain_or_original(multi_scale_deformable_attention, original)


def _plain_v2_function(original: Callable) -> Callable:
    return inside_decorators(original, lambda original: plain_or_original(partial(_plain_v2, original), original))


def _plain_v2(
    original: Callable,
    value: torch.Tensor,  # [B, S, H, D]
    value_spatial_shapes: torch.Tensor | Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,  # [B, N, H, K, 2]
    attention_weights: torch.Tensor,  # [B, N, H, K]
    num_points_list: Sequence[int],
    method: str = DEFAULT_METHOD,
) -> torch.Tensor:
    samples = (sampling_locations, attention_weights)
    if method != DEFAULT_METHOD:
        return original(value, value_spatial_shapes, *samples, num_points_list, method)
    return outside_autocast(ms_deform_attn, value, value_spatial_shapes, None, *samples, points=num_points_list)


@dataclass(frozen=True)
class Core:
    """The innermost call of some families: what it is called and in what its callers differ.

    Attributes:
        name: in the modeling file; a class whose `forward` is replaced, or a function.
        plain: original -> its replacement by the plain form.
        held_as: the attribute in which attention modules hold it, if they do.
        true_is_padding: what True in `attention_mask` says; elsewhere True is a position to attend.
        weights_by_level: attention weights are returned as [B, N, H, L, P]; else [B, N, H, K].
    """

    name: str
    plain: Callable[[Callable], Callable]
    held_as: str | None
    true_is_padding: bool = False
    weights_by_level: bool = True


LAYER = Core("MultiScaleDeformableAttention", _plain_layer, held_as="attn")
FUNCTION = Core("multi_scale_deformable_attention", _plain_function, held_as=None, true_is_padding=True)
V2_FUNCTION = Core(
    "multi_scale_deformable_attention_v2",
    _plain_v2_function,
    held_as="ms_deformable_attn_core",
    weights_by_level=False,
)


@dataclass(frozen=True)
class Family:
    """One modeling file of transformers.

    Attributes:
        name: of the family: `transformers.models.{name}.modeling_{name}`.
        prefix: of its attention class, `{prefix}MultiscaleDeformableAttention`.
        core: what that class calls.
        points: the attribute with (P_1, ..., P_L); None where every level has as many.
        method: the attribute that may ask for another operator than the bilinear one.
        weights_read: layers may read the attention weights without passing `output_attentions` on: always made.
    """

    name: str
    prefix: str
    core: Core
    points: str | None = None
    method: str | None = None
    weights_read: bool = False

    @property
    def attention(self) -> str:
        return f"{self.prefix}MultiscaleDeformableAttention"

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"


FAMILIES = {
    family.name: family
    for family in (
        Family("deformable_detr", "DeformableDetr", LAYER),
        Family("rt_detr", "RTDetr", LAYER),
        Family("grounding_dino", "GroundingDino", LAYER, weights_read=True),
        Family("mm_grounding_dino", "MMGroundingDino", LAYER, weights_read=True),
        Family("omdet_turbo", "OmDetTurbo", LAYER, weights_read=True),
        Family("lw_detr", "LwDetr", LAYER),
        Family("rf_detr", "RfDetr", LAYER),
        Family("pp_doclayout_v2", "PPDocLayoutV2", LAYER),
        Family("pp_doclayout_v3", "PPDocLayoutV3", LAYER),
        Family("pp_doclayout_v4", "PPDocLayoutV4", LAYER),
        Family("rt_detr_v2", "RTDetrV2", V2_FUNCTION, points="n_points_list", method="method"),
        Family("d_fine", "DFine", V2_FUNCTION, points="num_points_list", method="decoder_method"),
        Family("deimv2", "Deimv2", V2_FUNCTION, points="num_points_list", method="decoder_method"),
        Family("mask2former", "Mask2FormerPixelDecoderEncoder", FUNCTION),
        Family("oneformer", "OneFormerPixelDecoderEncoder", FUNCTION),
    )
}


def apply(model_or_family: nn.Module | str | None = None, *, verbose: bool = True) -> Report:
    """Run deformable attention of transformers on our ops.

    Args:
        model_or_family: a model, of which only its own modules change; the name of one of `FAMILIES`; or None for
            all of them.
        verbose: print the report.

    Returns:
        The report of what was replaced, what was left and why; it reverts, also as a context manager.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no such family, or a model without deformable attention of one of them.
        TypeError: neither a model nor a name.
    """
    if find_spec("transformers") is None:
        raise ImportError("transformers.apply: transformers is not installed: pip install transformers")
    choices = ", ".join(FAMILIES)
    with applying(CODEBASE, verbose=verbose) as report:
        if model_or_family is None:
            for family in FAMILIES.values():
                _replace_family(family, report)
        elif isinstance(model_or_family, nn.Module):
            _replace_in_model(model_or_family, report)
            if not report.replaced and not report.left:
                raise ValueError(
                    "transformers.apply: model_or_family: expected a model with deformable attention of one of "
                    f"{choices}; got {type(model_or_family).__name__}, which has none"
                )
        elif not isinstance(model_or_family, str):
            raise TypeError(
                f"transformers.apply: model_or_family: expected a model, None or one of {choices}; "
                f"got {type(model_or_family).__name__}"
            )
        elif model_or_family not in FAMILIES:
            raise ValueError(f"transformers.apply: model_or_family: expected one of {choices}; got {model_or_family!r}")
        else:
            _replace_family(FAMILIES[model_or_family], report)
    return report


def revert() -> None:
    """Put back everything that `apply` has replaced."""
    revert_all(CODEBASE)


def _replace_family(family: Family, report: Report) -> None:
    reason = _unknown_version(family)
    if reason is not None:
        report.leave(family.name, reason)
        return
    modeling = import_module(family.module)
    attention, core = getattr(modeling, family.attention), getattr(modeling, family.core.name)
    fused = partial(_fused_forward, family)
    report.replace_forward(attention, fused, name=f"{family.name}: {family.attention}", op=FUSED)
    name = f"{family.name}: {family.core.name}"
    if isinstance(core, type):
        report.replace_forward(core, family.core.plain, name=name, op=PLAIN)
    else:
        report.replace(modeling, family.core.name, family.core.plain(core), name=name, op=PLAIN)
    if family.method is not None:
        report.leave(f"{family.name}: any other method", f"method={DEFAULT_METHOD!r} alone is the operator of ours")


def _replace_in_model(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        family = _family_of(module)
        if family is not None:
            reason = _unknown_version(family)
            if reason is None:
                _replace_module(family, name or type(module).__name__, module, report)
            else:
                report.leave(name, reason)


def _family_of(module: nn.Module) -> Family | None:
    ancestors = {(ancestor.__module__, ancestor.__qualname__) for ancestor in type(module).__mro__}
    return next((family for family in FAMILIES.values() if (family.module, family.attention) in ancestors), None)


def _unknown_version(family: Family) -> str | None:
    """Why the installed transformers' modeling file is not one that we know; None if it is."""
    if find_spec(f"transformers.models.{family.name}") is None:
        return "this version of transformers does not have it"
    modeling = import_module(family.module)
    for name in (family.attention, family.core.name):
        if not hasattr(modeling, name):
            return f"{family.module} of this version of transformers has no {name}"
    parameters = inspect.signature(getattr(modeling, family.attention).forward).parameters
    missing = [name for name in _READ if name not in parameters]
    if missing:
        return f"{family.attention}.forward of this version of transformers has no {', '.join(missing)}"
    return None


def _replace_module(family: Family, name: str, module: nn.Module, report: Report) -> None:
    attention = getattr(import_module(family.module), family.attention)
    method = DEFAULT_METHOD if family.method is None else getattr(module, family.method)
    if method != DEFAULT_METHOD:
        report.leave(name, f"method={method!r} is another operator; method={DEFAULT_METHOD!r} is ours")
    elif type(module).forward is not attention.forward:
        _replace_held_core(family, name, module, report)
    else:
        report.replace_forward(module, partial(_fused_forward, family), name=name, op=FUSED)


def _replace_held_core(family: Family, name: str, module: nn.Module, report: Report) -> None:
    """The plain form in a module whose class overrides the forward that we know."""
    attribute = family.core.held_as
    held = None if attribute is None else getattr(module, attribute, None)
    if held is None:
        reason = f"{type(module).__name__} has a forward of its own; apply({family.name!r}) may reach what it calls"
        report.leave(name, reason)
    elif isinstance(held, nn.Module):
        report.replace_forward(held, family.core.plain, name=f"{name}.{attribute}", op=PLAIN)
    else:
        report.replace(module, attribute, family.core.plain(held), name=f"{name}.{attribute}", op=PLAIN)


def _fused_forward(family: Family, original: Callable) -> Callable:
    """The forward of a family's attention class with everything between its linear layers in one op."""
    names = tuple(inspect.signature(original).parameters)[1:]

    @wraps(original)
    def forward(self: nn.Module, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        other_method = family.method is not None and getattr(self, family.method) != DEFAULT_METHOD
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if other_method or not has_kernel(FUSED, arguments["hidden_states"]):
            return original(self, *args, **kwargs)
        return _fused_attention(self, family, **arguments)

    return forward


def _fused_attention(
    module: nn.Module,
    family: Family,
    *,
    hidden_states: torch.Tensor,  # [B, N, C]
    encoder_hidden_states: torch.Tensor,  # [B, S, C]
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    spatial_shapes_list: Sequence[tuple[int, int]],
    attention_mask: torch.Tensor | None = None,  # [B, S] bool
    position_embeddings: torch.Tensor | None = None,  # [B, N, C]
    output_attentions: bool | None = False,
    **_,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attended queries [B, N, C], and the attention weights where someone is going to read them."""
    if position_embeddings is not None:
        add = getattr(module, "with_pos_embed", torch.add)  # a method that a subclass may have changed
        hidden_states = add(hidden_states, position_embeddings)
    value = module.value_proj(encoder_hidden_states) if hasattr(module, "value_proj") else encoder_hidden_states
    offsets = module.sampling_offsets(hidden_states).unflatten(-1, (module.n_heads, -1, 2))
    logits = module.attention_weights(hidden_states).unflatten(-1, (module.n_heads, -1))
    scale = getattr(module, "offset_scale", BOX_SCALE)
    if reference_points.shape[-1] == 4 and scale != BOX_SCALE:
        offsets = offsets * (scale / BOX_SCALE)
    padding = attention_mask
    if padding is not None and not family.core.true_is_padding:
        padding = ~padding
    projected = hasattr(module, "output_proj")  # under autocast it casts, else what has been sampled is the result
    fused = ms_deform_attn_fused if projected else partial(outside_autocast, ms_deform_attn_fused)
    output = fused(
        value.unflatten(-1, (module.n_heads, -1)),
        spatial_shapes_list,
        reference_points,
        offsets,
        logits,
        points=None if family.points is None else getattr(module, family.points),
        value_mask=padding,
    )
    if projected:
        output = module.output_proj(output)
    if not (output_attentions or family.weights_read or module._forward_hooks):
        return output, None
    weights = torch.softmax(logits, dim=-1)
    return output, weights.unflatten(-1, (module.n_levels, -1)) if family.core.weights_by_level else weights
