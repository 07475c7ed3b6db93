"""Image to feature levels: a backbone of `transformers`, projections to one width, extra stride-2 levels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_FOR_BACKBONE_MAPPING_NAMES

if TYPE_CHECKING:
    from ..config import BackboneConfig

SETTINGS = "detector.backbone.settings"
NOT_THE_NETWORK = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder"),
    *("label2id", "model_type", "num_labels", "out_features", "out_indices", "output_attentions"),
    *("output_hidden_states", "problem_type", "return_dict", "stage_names", "transformers_version"),
}  # fmt: skip
"""Fields of every configuration of transformers that make no difference here, or are set here."""


class FrozenBatchNorm(nn.Module):
    """BatchNorm2d with fixed statistics and affine map, buffers under its names: [B, C, H, W], in the input's dtype."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


class Backbone(nn.Module):
    """[B, 3, H, W] -> the last `stages` feature maps [B, channels[i], H / stride, W / stride], finest first.

    Runs in channels-last memory format, so that a map flattens to tokens without a transposition.

    Raises ValueError for a model type without backbone, a setting that it does not have or take, more stages than there
    are, or a `frozen` name of nothing.
    """

    def __init__(self, config: BackboneConfig, stages: int) -> None:
        super().__init__()
        model = resolved(config)
        names = [name for name in model.stage_names if name != "stem"]
        if stages > len(names):
            raise ValueError(f"used_stages: expected at most {len(names)} for {model.model_type}, got {stages}")
        model.out_features = names[-stages:]
        try:
            fresh = config.weights is None
            self.body = AutoBackbone.from_config(model) if fresh else _pretrained(model, config.weights)
            self.channels = list(self.body.channels)
        except (LookupError, TypeError, ArithmeticError) as error:  # numbers that no layer can be made of
            raise ValueError(f"{SETTINGS}: no {model.model_type} can be built of {config.settings}: {error}") from error
        self.body.to(memory_format=torch.channels_last)
        if config.fine_tune:
            _freeze(self.body, config.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.body(images.contiguous(memory_format=torch.channels_last)).feature_maps)


def resolved(config: BackboneConfig) -> PretrainedConfig:
    """The configuration of transformers that is meant; it takes any setting, so that the names are checked here."""
    if config.weights is None and config.model not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        others = _unknown(config.model, MODEL_FOR_BACKBONE_MAPPING_NAMES)
        raise ValueError(f"detector.backbone: expected a model of transformers with an AutoBackbone: {others}")
    configured = AutoConfig.for_model if config.weights is None else AutoConfig.from_pretrained
    try:
        model = configured(config.weights or config.model, **config.settings)
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        field = "settings" if config.weights is None else f"weights: {config.weights}"
        raise ValueError(f"detector.backbone.{field}: {' '.join(str(error).split())[:300]}") from error
    if model.model_type not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        raise ValueError(f"detector.backbone.weights: {config.weights}: a {model.model_type} has no AutoBackbone")
    known = setting_names(model)
    for key in sorted(config.settings.keys() - known):
        raise ValueError(_unknown(key, known, f"{SETTINGS}."))
    return model


def _unknown(name: str, known: Iterable[str], prefix: str = "") -> str:
    nearest = get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix + nearest[0]!r}?" if nearest else f"keys there: {', '.join(sorted(known))}"
    return f"unknown key {prefix + name!r}; {hint}"


def setting_names(model: PretrainedConfig) -> set[str]:
    """Fields of a model type's configuration that make a difference to the network."""
    return {*type(model)().to_dict(), *model.attribute_map} - NOT_THE_NETWORK


def settings_of(model: PretrainedConfig) -> dict[str, Any]:
    """The settings that make the network, where they differ from the defaults of its type."""
    values, defaults = model.to_dict(), type(model)().to_dict()
    return {name: values[name] for name in sorted(setting_names(model)) if values.get(name) != defaults.get(name)}


def _freeze(body: nn.Module, prefixes: tuple[str, ...]) -> None:
    for prefix in prefixes:
        fixed = [parameter for name, parameter in body.named_parameters() if name.startswith(prefix)]
        if not fixed:
            raise ValueError(f"frozen: expected the beginning of a parameter's name in the backbone, got {prefix!r}")
        for parameter in fixed:
            parameter.requires_grad_(False)
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            body.set_submodule(name, FrozenBatchNorm(module))


def _pretrained(model: PretrainedConfig, weights: str) -> nn.Module:
    """AutoBackbone.from_pretrained, for local folders too; no layer may be left random but the norms of the outputs."""
    kind = MODEL_FOR_BACKBONE_MAPPING[type(model)]
    body, info = kind.from_pretrained(weights, config=model, dtype=torch.float32, output_loading_info=True)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("hidden_states_norms."))
    if missing:
        raise ValueError(
            f"weights: expected all of {model.model_type}'s parameters in {weights}, got none of {missing}"
        )
    return body


class FeatureLevels(nn.Module):
    """Feature maps -> `num_levels` maps of `embed_dim` channels: 1x1 (then 3x3 stride 2) convolutions, GroupNorm."""

    def __init__(self, channels: list[int], embed_dim: int, num_levels: int) -> None:
        super().__init__()
        coarser = [channels[-1]] + [embed_dim] * num_levels
        forms = [(width, 1, 1, 0) for width in channels]  # input channels, kernel, stride, padding
        forms += [(width, 3, 2, 1) for width in coarser[: num_levels - len(channels)]]
        groups = math.gcd(32, embed_dim // 4)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, embed_dim, *form), nn.GroupNorm(groups, embed_dim)) for width, *form in forms
        )
        for convolution, _ in self.projections:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [project(feature) for project, feature in zip(self.projections, features, strict=False)]
        coarsest = features[-1]
        for project in self.projections[len(features) :]:
            coarsest = project(coarsest)
            levels.append(coarsest)
        return levels
