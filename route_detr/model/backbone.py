"""Image to feature levels: a backbone of `transformers`, projections to one width, extra stride-2 levels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

if TYPE_CHECKING:
    from ..config import BackboneConfig


class FrozenBatchNorm(nn.Module):
    """BatchNorm2d with fixed statistics and affine map, buffers under its names: [B, C, H, W], in the input's dtype.

    One operator: the buffers are folded into a scale and a shift when they are loaded.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        for name in ("scale", "shift"):
            self.register_buffer(name, None, persistent=False)
        self._fold()

    def _fold(self) -> None:
        self.scale = (self.weight * (self.running_var + self.eps).rsqrt())[:, None, None]
        self.shift = self.bias[:, None, None] - self.running_mean[:, None, None] * self.scale

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fold()

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


class Backbone(nn.Module):
    """[B, 3, H, W] -> the last `stages` feature maps [B, channels[i], H / stride, W / stride], finest first.

    Runs in channels-last memory format, so that a map flattens to tokens without a transposition.

    Raises ValueError for a model type without backbone, a setting that it does not have or take, more stages than there
    are, or a `frozen` name of nothing.
    """

    def __init__(self, config: BackboneConfig, stages: int) -> None:
        super().__init__()
        model = config.resolved()
        names = [name for name in model.stage_names if name != "stem"]
        if stages > len(names):
            raise ValueError(f"used_stages: expected at most {len(names)} for {model.model_type}, got {stages}")
        model.out_features = names[-stages:]
        try:
            fresh = config.weights is None
            self.body = AutoBackbone.from_config(model) if fresh else _pretrained(model, config.weights)
            self.channels = list(self.body.channels)
        except (LookupError, TypeError, ArithmeticError) as error:  # numbers that no layer can be made of
            found = f"no {model.model_type} can be built of {config.settings}: {error}"
            raise ValueError(f"detector.backbone.settings: {found}") from error
        self.body.to(memory_format=torch.channels_last)
        if config.fine_tune:
            _freeze(self.body, config.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.body(images.contiguous(memory_format=torch.channels_last)).feature_maps)


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
