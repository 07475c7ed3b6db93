"""Two-stage Deformable-DETR++ with routed dual-branch training (Route-DETR, arXiv 2512.13876)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import route_kernels as rk

from .backbone import Backbone, FeatureLevels
from .boxes import corners
from .config import DetectorConfig, TrainConfig
from .decoder import Decoder
from .denoising import Denoised, Denoising, separated
from .eager import make_eager
from .encoder import Encoder, Memory, flatten_levels
from .heads import Predictions
from .masks import MASK_STRIDE, PixelEmbedding, full_masks, image_mask_logits
from .matcher import PaddedTargets, padded_targets
from .position import image_embedding
from .proposals import Proposals
from .schedule import ROUTE_TYPES, RouteType, RoutingValues


class DetectorOutput(NamedTuple):
    """Predictions of every decoder layer [B, G, N, .], of the first stage [B, 1, S, .], and alpha.

    G = 2 holds (main, auxiliary); G = 1 is one result that stands for both branches. In training a detector with
    denoising adds the predictions of the denoising queries, one that segments the pixel embeddings.
    """

    layers: list[Predictions]
    proposals: Predictions
    aux_weight: Tensor  # 0-dim; 0 where there is no auxiliary branch
    denoising: Denoised | None = None
    pixel_embeddings: Tensor | None = None  # [B, E, h, w] at 1/4 of the images' size

    @property
    def logits(self) -> Tensor:
        """Class logits [B, N, K] of the main branch's last layer."""
        return self.layers[-1].logits[:, 0]

    @property
    def boxes(self) -> Tensor:
        """Boxes [B, N, 4] (cx, cy, w, h) in [0, 1] of the main branch's last layer."""
        return self.layers[-1].boxes[:, 0]


class RoutedLayerView(NamedTuple):
    """What a routed layer's bias is made of, for inspection."""

    factors: rk.RoutingFactors  # at strength 1
    boxes: Tensor  # [B, N, 4] reference boxes that enter the layer
    confidence: Tensor  # [B, N] highest class probability of the layer before; 0 in the first layer


class RoutingState(nn.Module):
    """lambda of each decoder layer, alpha and the route type as buffers: a reloaded run goes on where it stopped.

    The host keeps a copy of what it wrote, so that a step need not wait for the device to read it back.
    """

    def __init__(self, decoder_layers: int, routed_layers: Sequence[int]) -> None:
        super().__init__()
        self._routed_layers = list(routed_layers)
        self.register_buffer("strength", torch.zeros(decoder_layers))  # 0 where a layer is not routed
        self.register_buffer("aux_weight", torch.zeros(()))
        self.register_buffer("route_type", torch.zeros((), dtype=torch.int64))  # index in ROUTE_TYPES
        self._on_host: RoutingValues | None = None

    @torch.no_grad()
    def write(self, values: RoutingValues) -> None:
        strengths, (alpha,) = (torch.tensor(numbers).tolist() for numbers in (values.strengths, [values.aux_weight]))
        values = RoutingValues(tuple(strengths), alpha, values.route_type)  # as float32, as they are read back
        if values == self._on_host:
            return
        strength = torch.zeros(self.strength.shape)
        strength[self._routed_layers] = torch.tensor(values.strengths)
        self.strength.copy_(strength)
        self.aux_weight.fill_(values.aux_weight)
        self.route_type.fill_(ROUTE_TYPES.index(values.route_type))
        self._on_host = values

    def read(self) -> RoutingValues:
        if self._on_host is None:
            strengths, alpha = self.strength[self._routed_layers].tolist(), self.aux_weight.item()
            self._on_host = RoutingValues(tuple(strengths), alpha, ROUTE_TYPES[int(self.route_type)])
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
        self.pixel_embedding = PixelEmbedding(self.backbone.channels[0], config.embed_dim) if config.masks else None
        self.routing = RoutingState(config.decoder_layers, config.routed_layer_indices)
        if config.memory == "none":
            make_eager(self)

    def set_routing(
        self, strength: float | Sequence[float], aux_weight: float, route_type: RouteType = "gated"
    ) -> None:
        """Sets lambda (one for all routed layers, or one each), alpha and the route type.

        ValueError for negative or non-finite numbers, non-zero ones without routing, and a wrong number of strengths.
        """
        layers = len(self.config.routed_layer_indices)
        strengths = tuple(strength) if isinstance(strength, Sequence) else (strength,) * max(1, layers)
        if isinstance(strength, Sequence) and len(strengths) != layers:
            raise ValueError(f"strength: expected one number or {layers}, one a routed layer, got {len(strengths)}")
        for name, value in (*(("strength", value) for value in strengths), ("aux_weight", aux_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
            if value and not self.config.route:
                raise ValueError(f"{name}: expected 0 in a detector without routing, got {value!r}")
        if route_type not in ROUTE_TYPES:
            raise ValueError(f"route_type: expected one of {', '.join(ROUTE_TYPES)}, got {route_type!r}")
        self.routing.write(RoutingValues(strengths[:layers], aux_weight, route_type))

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, targets: Sequence | None = None
    ) -> DetectorOutput:
        """targets (objects with boxes [T, 4] and labels [T], one an image) are what denoising queries start from."""
        _check_images(images, padding_mask)
        features = self.backbone(images)
        padded = None
        if self.training and self.denoising is not None:
            if targets is None:
                raise ValueError("targets: expected those of the images, to train with denoising queries, got none")
            padded = padded_targets(targets, like=images)
        return self.transformer(features, padding_mask, padded)

    def transformer(
        self, features: list[Tensor], padding_mask: Tensor | None = None, targets: PaddedTargets | None = None
    ) -> DetectorOutput:
        """All after the backbone, one graph: its feature maps and the images' padding -> DetectorOutput."""
        dual = self.training and self.config.route
        memory = self._encoded(features, padding_mask)
        proposals, queries = self.proposals(memory)
        if targets is not None:
            queries = self.denoising(queries, targets)
        layers, denoised = self.decoder(queries, memory, self.routing.read() if dual else None), None
        if queries.denoising is not None:
            layers, denoised = separated(layers, queries.denoising)
        aux_weight = self.routing.aux_weight if dual else torch.zeros_like(self.routing.aux_weight)
        return DetectorOutput(layers, proposals, aux_weight, denoised, self._pixels(features, memory))

    def _encoded(self, features: list[Tensor], padding_mask: Tensor | None) -> Memory:
        levels = self.feature_levels(features[-self.config.backbone.used_stages :])
        config = self.config
        return self.encoder(*flatten_levels(levels, padding_mask, config.position_temperature, config.position_offset))

    def _pixels(self, features: list[Tensor], memory: Memory) -> Tensor | None:
        if self.pixel_embedding is None:
            return None
        height, width = memory.spatial_shapes[0]
        finest, positions = (x[:, : height * width] for x in (memory.features, memory.positions))
        where = image_embedding(positions, finest.shape[-1], self.config.position_temperature)
        return self.pixel_embedding(features[0], (finest + where).mT.unflatten(2, (height, width)))

    @torch.no_grad()
    def routing_factors(self, images: Tensor, padding_mask: Tensor | None = None) -> dict[int, RoutedLayerView]:
        """What each routed layer has learned, seen on the main branch's queries in eval mode; {} without routing."""
        was_training = self.training
        self.eval()
        try:
            _check_images(images, padding_mask)
            memory = self._encoded(self.backbone(images), padding_mask)
            entering = self.decoder.observed_queries(self.proposals(memory)[1], memory)
            return {
                index: RoutedLayerView(
                    self.decoder.routing(index, queries, strength=1.0, route_type="gated"),
                    queries.box_logits[:, 0].sigmoid(),
                    queries.confidence[:, 0],
                )
                for index, queries in entering.items()
            }
        finally:
            self.train(was_training)


def _check_images(images: Tensor, padding_mask: Tensor | None) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images: expected a floating-point tensor [B, 3, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    expected = (images.shape[0], *images.shape[2:])
    if padding_mask is not None and (padding_mask.dtype != torch.bool or padding_mask.shape != expected):
        raise ValueError(
            f"padding_mask: expected bool {expected}, got {padding_mask.dtype} {tuple(padding_mask.shape)}"
        )


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
    """
    probabilities = output.logits.sigmoid()
    batch, queries, classes = probabilities.shape
    if len(sizes) != batch:
        raise ValueError(f"sizes: expected {batch} pairs (height, width), got {len(sizes)}")
    scores, best = probabilities.flatten(1).topk(min(top_k, queries * classes), dim=1)
    query = best // classes
    boxes = corners(output.boxes).clamp(0, 1)
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    scale = boxes.new_tensor([(width, height, width, height) for height, width in sizes])[:, None]
    found = [
        {"scores": s, "labels": label, "boxes": box}
        for s, label, box in zip(scores, best % classes, boxes * scale, strict=True)
    ]
    if output.pixel_embeddings is not None:
        embeddings = output.layers[-1].mask_embeddings[:, 0]
        for image, (pixels, size) in enumerate(zip(output.pixel_embeddings, sizes, strict=True)):
            seen = (MASK_STRIDE * pixels.shape[1], MASK_STRIDE * pixels.shape[2])
            logits = image_mask_logits(
                embeddings[image, query[image]], pixels, seen if input_sizes is None else input_sizes[image]
            )
            found[image]["masks"] = full_masks(logits, size)
    return found


def parameter_groups(detector: Detector, config: TrainConfig) -> list[dict]:
    """Optimizer groups "main", "backbone" and "sampling" (layers that give sampling offsets), by learning rate.

    Raises ValueError for a backbone whose fixed layers would be random: `fine_tune` without `weights`.
    """
    backbone_config = detector.config.backbone
    if backbone_config.fine_tune and backbone_config.weights is None:
        raise ValueError(
            "detector.backbone.weights: expected a model name or folder, since fine_tune fixes the stem and all norms, "
            "got None (or set detector.backbone.fine_tune to false to train from scratch)"
        )
    scales = {
        "main": 1.0,
        "backbone": config.backbone_learning_rate_scale,
        "sampling": config.sampling_learning_rate_scale,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in scales}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            kind = "backbone" if name.startswith("backbone.") else "sampling" if "sampling_offsets" in name else "main"
            groups[kind].append(parameter)
    return [
        {"name": kind, "params": groups[kind], "lr": config.learning_rate * scale, "weight_decay": config.weight_decay}
        for kind, scale in scales.items()
        if groups[kind]
    ]
