"""Two-stage Deformable-DETR++ with routed dual-branch training (Route-DETR, arXiv 2512.13876)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from route_kernels.nn import BoxTargets, pack_targets

from .backbone import Backbone, FeatureLevels
from .blocks import Blocks
from .decoder import Decoder
from .denoising import Denoising
from .encoder import Encoder
from .masks import PixelEmbedding
from .proposals import Proposals
from .structures import ROUTE_TYPES, Denoised, DetectorOutput, Memory, RouteType, Routing, RoutingValues

if TYPE_CHECKING:
    from ..config import DetectorConfig


class RoutingState(nn.Module):
    """lambda of each decoder layer, alpha and the route type as buffers: a reloaded run goes on where it stopped.

    The host keeps what decides about the graph: a step need not wait for the device to read it back.
    """

    def __init__(self, decoder_layers: int, routed_layers: Sequence[int]) -> None:
        super().__init__()
        self.routed = list(routed_layers)
        self.register_buffer("strength", torch.zeros(decoder_layers))  # 0 where a layer is not routed
        self.register_buffer("aux_weight", torch.zeros(()))
        self.register_buffer("route_type", torch.zeros((), dtype=torch.int64))  # index in ROUTE_TYPES
        self._on_host: tuple[tuple[bool, ...], RouteType] | None = None

    @torch.no_grad()
    def write(self, values: RoutingValues) -> None:
        strengths = dict(zip(self.routed, values.strengths, strict=True))
        for index, strength in strengths.items():
            self.strength[index].fill_(strength)
        self.aux_weight.fill_(values.aux_weight)
        self.route_type.fill_(ROUTE_TYPES.index(values.route_type))
        active = tuple(strengths.get(index, 0) > 0 for index in range(len(self.strength)))
        self._on_host = active, values.route_type

    def read(self) -> Routing:
        if self._on_host is None:
            self._on_host = tuple((self.strength > 0).tolist()), ROUTE_TYPES[int(self.route_type)]
        return Routing(self.strength, *self._on_host)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._on_host = None


class Detector(nn.Module):
    """Images [B, 3, H, W] and padding_mask [B, H, W] bool (True = padding, or None) -> DetectorOutput.

    In training mode a routed detector runs the auxiliary branch too, once lambda > 0; while lambda is 0 the
    branches are one. In eval mode it is the plain detector: routers are not touched.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        used = config.backbone.used_stages
        self.backbone = Backbone(config.backbone, used + config.masks)
        self.feature_levels = FeatureLevels(self.backbone.channels[-used:], config.embed_dim, config.num_levels)
        self.encoder = Encoder(config)
        self.proposals = Proposals(config)
        self.decoder = Decoder(config)
        with torch.random.fork_rng([]):  # what begins at random after it begins as it would without it
            self.denoising = Denoising(config) if config.denoising_pairs else None
        self.pixel_embedding = PixelEmbedding(config, self.backbone.channels[0]) if config.masks else None
        self.routing = RoutingState(config.decoder_layers, config.routed_layer_indices)
        self.blocks = Blocks(config)

    def set_routing(
        self, strength: float | Sequence[float], aux_weight: float, route_type: RouteType = "gated"
    ) -> None:
        """Sets lambda (one for all routed layers, or one each), alpha and the route type.

        ValueError for negative or non-finite numbers, non-zero ones without routing, and a wrong number of strengths.
        """
        layers = len(self.config.routed_layer_indices)
        given = tuple(strength) if isinstance(strength, Sequence) else (strength,)
        strengths = given if isinstance(strength, Sequence) else given * layers
        if len(strengths) != layers:
            raise ValueError(f"strength: expected one number or {layers}, one a routed layer, got {len(strengths)}")
        for name, value in (*(("strength", each) for each in given), ("aux_weight", aux_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
            if value and not self.config.route:
                raise ValueError(f"{name}: expected 0 in a detector without routing, got {value!r}")
        if route_type not in ROUTE_TYPES:
            raise ValueError(f"route_type: expected one of {', '.join(ROUTE_TYPES)}, got {route_type!r}")
        self.routing.write(RoutingValues(strengths, aux_weight, route_type))

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, targets: Sequence | None = None
    ) -> DetectorOutput:
        """targets (objects with boxes [T, 4] and labels [T], one an image) are what denoising queries start from."""
        features, packed = self.checked_features(images, padding_mask), None
        if self.training and self.denoising is not None:
            if targets is None:
                raise ValueError("targets: expected those of the images, to train with denoising queries, got none")
            packed = pack_targets(targets, images.device, images.dtype, self.config.num_classes)
        with self.blocks.backend():
            return self.transformer(features, padding_mask, packed)

    def transformer(
        self, features: list[Tensor], padding_mask: Tensor | None = None, targets: BoxTargets | None = None
    ) -> DetectorOutput:
        """All after the backbone, one graph: its feature maps and the images' padding -> DetectorOutput."""
        dual = self.training and self.config.route
        memory = self.encoded(features, padding_mask)
        proposals, queries = self.proposals(memory)
        if targets is not None:
            queries = self.denoising(queries, targets)
        layers, denoised = self.decoder(queries, memory, self.routing.read() if dual else None), None
        if queries.denoising is not None:
            denoised = Denoised([layer.of(slice(queries.matching, None)) for layer in layers], queries.denoising)
            layers = [layer.of(slice(queries.matching)) for layer in layers]
        aux_weight = self.routing.aux_weight if dual else torch.zeros_like(self.routing.aux_weight)
        pixels = None if self.pixel_embedding is None else self.pixel_embedding(features[0], memory)
        return DetectorOutput(layers, proposals, aux_weight, denoised, pixels)

    def checked_features(self, images: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: expected a floating-point tensor [B, 3, H, W], got {got}")
        expected = (images.shape[0], *images.shape[2:])
        if padding_mask is not None and (padding_mask.dtype != torch.bool or padding_mask.shape != expected):
            got = f"{padding_mask.dtype} {tuple(padding_mask.shape)}"
            raise ValueError(f"padding_mask: expected bool {expected}, got {got}")
        return self.backbone(images)

    def encoded(self, features: list[Tensor], padding_mask: Tensor | None) -> Memory:
        """The backbone's feature maps, encoded."""
        return self.encoder(self.feature_levels(features[-self.config.backbone.used_stages :]), padding_mask)
