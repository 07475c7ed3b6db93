"""Image to feature levels: a ResNet of `transformers`, projections to one width, extra stride-2 levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import ResNetConfig
from transformers.models.resnet.modeling_resnet import ResNetBackbone

from .config import BackboneConfig


class Backbone(nn.Module):
    """[B, 3, H, W] -> the last `used_stages` feature maps, finest first; strides 4, 8, 16, ... by stage.

    Runs in channels-last memory format, so that a map flattens to tokens without a transposition.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        stages = len(config.channels)
        out_features = [f"stage{stage}" for stage in range(stages - config.used_stages + 1, stages + 1)]
        if config.weights is None:
            self.body = ResNetBackbone(
                ResNetConfig(
                    embedding_size=config.stem_channels,
                    hidden_sizes=list(config.channels),
                    depths=list(config.depths),
                    layer_type=config.block,
                    out_features=out_features,
                )
            )
        else:
            self.body = ResNetBackbone.from_pretrained(config.weights, out_features=out_features)
        self.body.to(memory_format=torch.channels_last)
        self.channels = list(self.body.channels)
        self.fine_tune = config.fine_tune
        if self.fine_tune:
            self.body.embedder.requires_grad_(False)
            self.body.encoder.stages[0].requires_grad_(False)
            for norm in self._norms():
                norm.requires_grad_(False)

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> Backbone:
        """As in any module, but fixed statistics stay fixed when fine-tuning."""
        super().train(mode)
        if self.fine_tune:
            for norm in self._norms():
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.body(images.contiguous(memory_format=torch.channels_last)).feature_maps)


class FeatureLevels(nn.Module):
    """Feature maps -> `num_levels` maps of `embed_dim` channels: 1x1 (then 3x3 stride 2) convolutions, GroupNorm."""

    def __init__(self, channels: list[int], embed_dim: int, num_levels: int) -> None:
        super().__init__()
        inputs = [(width, 1) for width in channels]
        for extra in range(num_levels - len(channels)):
            inputs.append((channels[-1] if extra == 0 else embed_dim, 3))
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, embed_dim, kernel, stride=1 if kernel == 1 else 2, padding=kernel // 2),
                nn.GroupNorm(math.gcd(32, embed_dim // 4), embed_dim),
            )
            for width, kernel in inputs
        )
        for projection in self.projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [project(feature) for project, feature in zip(self.projections, features, strict=False)]
        for extra, project in enumerate(self.projections[len(features) :]):
            levels.append(project(features[-1] if extra == 0 else levels[-1]))
        return levels
