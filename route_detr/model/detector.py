"""Two-stage Deformable-DETR++ with routed dual-branch training (Route-DETR, arXiv 2512.13876)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, FeatureLevels
from .blocks import Blocks
from .boxes import corners
from .decoder import Decoder
from .denoising import Denoising
from .encoder import Encoder, flatten_levels
from .masks import MASK_STRIDE, PixelEmbedding, full_masks, image_mask_logits
from .matcher import padded_targets
from .proposals import Proposals
from .structures import (
    ROUTE_TYPES,
    Denoised,
    DetectorOutput,
    Memory,
    PaddedTargets,
    RoutedLayerView,
    RouteType,
    RoutingValues,
)

if TYPE_CHECKING:
    from ..config import DetectorConfig, TrainConfig


class RoutingState(nn.Module):
    """lambda of each decoder layer, alpha and the route type as buffers: a reloaded run goes on where it stopped.

    The host keeps a copy: a step need not wait for the device to read them back.
    """

    def __init__(self, decoder_layers: int, routed_layers: Sequence[int]) -> None:
        super().__init__()
        self.routed = list(routed_layers)
        self.register_buffer("strength", torch.zeros(decoder_layers))  # 0 where a layer is not routed
        self.register_buffer("aux_weight", torch.zeros(()))
        self.register_buffer("route_type", torch.zeros((), dtype=torch.int64))  # index in ROUTE_TYPES
        self._on_host: RoutingValues | None = None

    @torch.no_grad()
    def write(self, values: RoutingValues) -> None:
        *strengths, alpha = torch.tensor([*values.strengths, values.aux_weight]).tolist()  # rounded, as in the buffers
        for index, strength in zip(self.routed, strengths, strict=True):
            self.strength[index].fill_(strength)
        self.aux_weight.fill_(alpha)
        self.route_type.fill_(ROUTE_TYPES.index(values.route_type))
        self._on_host = RoutingValues(tuple(strengths), alpha, values.route_type)

    def read(self) -> RoutingValues:
        if self._on_host is None:
            strengths = tuple(self.strength[self.routed].tolist())
            self._on_host = RoutingValues(strengths, self.aux_weight.item(), ROUTE_TYPES[int(self.route_type)])
        return self._on_host

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
        features, padded = self._features(images, padding_mask), None
        if self.training and self.denoising is not None:
            if targets is None:
                raise ValueError("targets: expected those of the images, to train with denoising queries, got none")
            padded = padded_targets(targets, like=images)
        with self.blocks.backend():
            return self.transformer(features, padding_mask, padded)

    def transformer(
        self, features: list[Tensor], padding_mask: Tensor | None = None, targets: PaddedTargets | None = None
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

    def _features(self, images: Tensor, padding_mask: Tensor | None) -> list[Tensor]:
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
        config, levels = self.config, self.feature_levels(features[-self.config.backbone.used_stages :])
        return self.encoder(*flatten_levels(levels, padding_mask, config.position_temperature, config.position_offset))

    @torch.no_grad()
    def routing_factors(self, images: Tensor, padding_mask: Tensor | None = None) -> dict[int, RoutedLayerView]:
        """What each routed layer has learned, seen on the main branch's queries in eval mode; {} without routing."""
        was_training = self.training
        self.eval()
        try:
            memory = self.encoded(self._features(images, padding_mask), padding_mask)
            return {
                index: RoutedLayerView(
                    self.decoder.routing(index, queries, strength=1.0, route_type="gated"),
                    queries.box_logits[:, 0].sigmoid(),
                    queries.confidence[:, 0],
                )
                for index, (queries, _) in enumerate(self.decoder.steps(self.proposals(memory)[1], memory))
                if index in self.config.routed_layer_indices
            }
        finally:
            self.train(was_training)


@torch.no_grad()
def detections(
    output: DetectorOutput,
    sizes: Sequence[tuple[int, int]],
    top_k: int = 100,
    input_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Tensor]]:
    """The top_k (query, class) pairs of each image, best first, from the main branch's last layer.

    sizes: (height, width) in pixels of each image. Returns for each image scores [k], labels [k] int64 and boxes [k, 4]
    (x0, y0, x1, y1) in pixels, clipped to the image; k = min(top_k, N K). With masks also masks [k, height, width],
    bool; for them input_sizes gives (height, width) of the images that the detector saw, None: without padding.

    Raises FloatingPointError for an image whose logits, boxes or mask embeddings are not finite.
    """
    probabilities = output.logits.sigmoid()
    batch, queries, classes = probabilities.shape
    if len(sizes) != batch:
        raise ValueError(f"sizes: expected {batch} pairs (height, width), got {len(sizes)}")
    parts = [output.logits, output.boxes, output.pixel_embeddings, output.layers[-1].mask_embeddings]
    extremes = [extreme for part in parts if part is not None for extreme in part.flatten(1).aminmax(dim=1)]
    if spoilt := torch.stack(extremes).isfinite().all(0).logical_not().nonzero().flatten().tolist():
        raise FloatingPointError(f"what the detector computes for image {spoilt[0] + 1} of {batch} is not finite")
    scores, best = probabilities.flatten(1).topk(min(top_k, queries * classes), dim=1)
    found = []
    for image, (height, width) in enumerate(sizes):
        query = best[image] // classes
        boxes = corners(output.boxes[image]).clamp(0, 1)[query] * scores.new_tensor([width, height] * 2)
        found.append({"scores": scores[image], "labels": best[image] % classes, "boxes": boxes})
        if output.pixel_embeddings is not None:
            pixels, embeddings = output.pixel_embeddings[image], output.layers[-1].mask_embeddings[image, 0, query]
            seen = [MASK_STRIDE * side for side in pixels.shape[1:]] if input_sizes is None else input_sizes[image]
            found[-1]["masks"] = full_masks(image_mask_logits(embeddings, pixels, seen), (height, width))
    return found


def parameter_groups(detector: Detector, config: TrainConfig, weights_follow: bool = False) -> list[dict]:
    """Optimizer groups "main", "backbone" and "sampling" (layers that give sampling offsets), by learning rate.

    Raises ValueError for a backbone whose fixed layers would be random: `fine_tune` without `weights`, where no
    checkpoint follows.
    """
    backbone = detector.config.backbone
    if backbone.fine_tune and backbone.weights is None and not weights_follow:
        raise ValueError(
            "detector.backbone.weights: expected a model name or folder, since fine_tune fixes the stem and all norms, "
            "got None (or begin with a checkpoint by --init, or train from scratch with "
            "detector.backbone.fine_tune=false)"
        )
    scales = {"backbone": config.backbone_learning_rate_scale, "sampling": config.sampling_learning_rate_scale}
    groups: dict[str, list[nn.Parameter]] = {"main": [], "backbone": [], "sampling": []}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            kind = "backbone" if name.startswith("backbone.") else "sampling" if "sampling_offsets" in name else "main"
            groups[kind].append(parameter)
    fixed = {"weight_decay": config.weight_decay}
    return [
        {"name": kind, "params": parameters, "lr": config.learning_rate * scales.get(kind, 1.0), **fixed}
        for kind, parameters in groups.items()
        if parameters
    ]
