"""Frozen configuration of the detector and of its training, with the named presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from .data.transforms import TransformConfig


def _require(condition: bool, field_name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{field_name}: expected {expected}, got {value!r}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, name, "a positive number", getattr(config, name))


def _require_non_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value >= 0, name, "a finite number >= 0", value)


@dataclass(frozen=True)
class BackboneConfig:
    """A residual network of the `transformers` ResNet family; its last stages feed the detector."""

    block: str = "bottleneck"  # "basic" or "bottleneck"
    stem_channels: int = 64
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    used_stages: int = 3  # the last so many stages become feature levels
    fine_tune: bool = False  # BatchNorm fixed, stem and first stage not trained: for pretrained weights
    weights: str | None = None  # model name or folder for `from_pretrained`; None: initialised at random

    def __post_init__(self) -> None:
        _require(self.block in ("basic", "bottleneck"), "block", "'basic' or 'bottleneck'", self.block)
        _require_positive(self, "stem_channels")
        _require(len(self.channels) > 0 and min(self.channels) > 0, "channels", "positive numbers", self.channels)
        same_length = len(self.depths) == len(self.channels) and min(self.depths) > 0
        _require(same_length, "depths", f"{len(self.channels)} positive numbers, one a stage", self.depths)
        in_range = 1 <= self.used_stages <= len(self.channels)
        _require(in_range, "used_stages", f"a number from 1 to {len(self.channels)}", self.used_stages)


@dataclass(frozen=True)
class DetectorConfig:
    """Two-stage Deformable-DETR++ with routed decoder layers."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 91
    embed_dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    num_levels: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 300
    query_content: str = "learned"  # or "encoded": the feature of the query's proposal
    ffn_dim: int = 2048
    route: bool = True
    routed_layers: str | tuple[int, ...] = "last:2"  # "last:K", "all" or layer numbers from 0
    branches: str = "packed"  # "packed": fork late, pack the branches; "two_pass": run the whole decoder twice
    router_rank: int = 16
    router_hidden_dim: int = 64
    router_gate_rank: int = 32
    router_limit: float = 5.0
    router_nonnegative: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("num_classes", "embed_dim", "num_heads", "num_points", "encoder_layers", "decoder_layers"),
            *("num_queries", "ffn_dim", "router_rank", "router_hidden_dim", "router_gate_rank", "router_limit"),
        )
        _require(self.embed_dim % 4 == 0, "embed_dim", "a multiple of 4", self.embed_dim)
        divides = self.embed_dim % self.num_heads == 0
        _require(divides, "num_heads", f"a divisor of embed_dim = {self.embed_dim}", self.num_heads)
        enough_levels = self.num_levels >= self.backbone.used_stages
        _require(enough_levels, "num_levels", f"at least used_stages = {self.backbone.used_stages}", self.num_levels)
        _require(self.branches in ("packed", "two_pass"), "branches", "'packed' or 'two_pass'", self.branches)
        _require(
            self.query_content in ("learned", "encoded"), "query_content", "'learned' or 'encoded'", self.query_content
        )
        self.routed_layer_indices  # noqa: B018  (raises for a bad `routed_layers`)

    @property
    def routed_layer_indices(self) -> tuple[int, ...]:
        """The routed decoder layers, ascending; empty without routing."""
        routed, total = self.routed_layers, self.decoder_layers
        if routed == "all":
            indices = tuple(range(total))
        elif isinstance(routed, str):
            prefix, _, count = routed.partition(":")
            valid = prefix == "last" and count.isdecimal() and 1 <= int(count) <= total
            _require(valid, "routed_layers", f"'all', 'last:1' to 'last:{total}' or layer numbers", routed)
            indices = tuple(range(total - int(count), total))
        else:
            indices = tuple(sorted(set(routed)))
            valid = bool(indices) and all(type(i) is int and 0 <= i < total for i in indices)
            _require(valid, "routed_layers", f"one or more layer numbers from 0 to {total - 1}", routed)
        return indices if self.route else ()


@dataclass(frozen=True)
class TrainConfig:
    """The public recipe: focal, L1 and GIoU losses, AdamW, and the two routing schedules."""

    epochs: int = 12
    batch_size: int = 16
    learning_rate: float = 1e-4
    backbone_learning_rate_scale: float = 0.1
    sampling_learning_rate_scale: float = 0.1  # layers that give sampling offsets
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    warmup_steps: int = 0  # the learning rate rises linearly over so many steps
    drop_at: float = 10 / 12  # fraction of the run after which the learning rate is x0.1
    seed: int = 0
    workers: int = 2
    time_budget: float | None = None  # seconds after which training ends, whatever `epochs` says
    eval_every: int = 1  # epochs
    log_every: int = 20  # steps
    checkpoint_every: int = 200  # steps; and at the end of each epoch
    top_k: int = 100  # detections of an image
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    match_class_weight: float = 2.0
    match_l1_weight: float = 5.0
    match_giou_weight: float = 2.0
    mask_weight: float = 5.0  # weights and points of masks (Mask2Former's), for a detector that has them
    dice_weight: float = 5.0
    match_mask_weight: float = 5.0
    match_dice_weight: float = 5.0
    mask_points: int = 12544  # at which a mask is compared
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    strength_max: float = 0.3  # lambda(t): 0, then a cosine up to this
    strength_warmup_epochs: float = 1.0
    strength_ramp_epochs: float = 4.0
    aux_start: float = 0.3  # alpha(t): from this, a cosine over the same epochs
    aux_max: float = 0.7

    def __post_init__(self) -> None:
        _require_positive(self, "epochs", "batch_size", "learning_rate", "clip_norm")
        _require_positive(self, "eval_every", "log_every", "checkpoint_every", "top_k", "mask_points")
        _require_non_negative(
            self,
            *("backbone_learning_rate_scale", "sampling_learning_rate_scale", "weight_decay", "workers", "seed"),
            "warmup_steps",
            *("class_weight", "l1_weight", "giou_weight"),
            *("match_class_weight", "match_l1_weight", "match_giou_weight", "focal_gamma"),
            *("mask_weight", "dice_weight", "match_mask_weight", "match_dice_weight"),
            *("strength_max", "strength_warmup_epochs", "strength_ramp_epochs", "aux_start", "aux_max"),
        )
        spendable = self.time_budget is None or self.time_budget > 0
        _require(spendable, "time_budget", "a positive number of seconds, or None", self.time_budget)
        _require(0 < self.drop_at <= 1, "drop_at", "a fraction in (0, 1]", self.drop_at)
        _require(0 <= self.focal_alpha <= 1, "focal_alpha", "a number in [0, 1]", self.focal_alpha)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; a round trip through JSON gives an equal object."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    transforms: TransformConfig = field(default_factory=TransformConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary that `json` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`; missing keys take the defaults, an unknown key raises ValueError."""
        return _from_dict(cls, values, "config")

    def updated(self, changes: Mapping[str, Any]) -> Config:
        """A copy with dotted keys replaced, as `{"train.epochs": 3}`; an unknown key raises ValueError."""
        values = self.to_dict()
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            section = values
            for parent in parents:
                section = section.get(parent) if isinstance(section, dict) else None
            if not isinstance(section, dict) or last not in section:
                raise ValueError(f"config: unknown key {dotted!r}")
            section[last] = value
        return Config.from_dict(values)


def _from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    _require(isinstance(values, Mapping), where, "a mapping of field names to values", values)
    types = get_type_hints(cls)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(types))}")
    return cls(**{name: _converted(types[name], value, f"{where}.{name}") for name, value in values.items()})


def _converted(expected: Any, value: Any, where: str) -> Any:
    """`value` as the type that a field declares: JSON has lists for tuples, and ints where floats are meant."""
    if dataclasses.is_dataclass(expected):
        return _from_dict(expected, value, where)
    if isinstance(value, list | tuple):
        value = tuple(value)
        valid = expected in (tuple[int, ...], str | tuple[int, ...]) and all(type(item) is int for item in value)
    elif expected in (float, float | None):
        valid = type(value) in (int, float) or (value is None and expected is not float)
        value = float(value) if type(value) is int else value
    else:
        valid = {
            int: type(value) is int,
            bool: type(value) is bool,
            str: isinstance(value, str),
            str | None: value is None or isinstance(value, str),
            str | tuple[int, ...]: isinstance(value, str),
        }.get(expected, False)
    _require(valid, where, str(getattr(expected, "__name__", expected)), value)
    return value


PRESETS = {
    # For 128 x 128 images of digits on two CPU cores, from scratch. In so short a training the classes come last, hence
    # their weight; a mirrored digit is none, hence no flips.
    "tiny": Config(
        DetectorConfig(
            backbone=BackboneConfig(block="basic", stem_channels=32, channels=(32, 64, 128, 256), depths=(1, 1, 1, 1)),
            num_classes=10,
            embed_dim=128,
            num_heads=4,
            num_levels=3,
            encoder_layers=2,
            decoder_layers=3,
            num_queries=60,
            query_content="encoded",
            ffn_dim=256,
            routed_layers="last:1",
        ),
        TrainConfig(
            batch_size=8,
            learning_rate=8e-4,
            warmup_steps=50,
            backbone_learning_rate_scale=1.0,
            sampling_learning_rate_scale=1.0,
            drop_at=0.8,
            class_weight=4.0,
            workers=0,
            strength_warmup_epochs=0.4,  # an epoch of the 5000 bundled images has 625 steps
            strength_ramp_epochs=1.6,
        ),
        TransformConfig.single_scale(128, flip=0.0),
    ),
    # The paper's Deformable-DETR++ with ResNet-50, 12 epochs, 300 queries.
    "deformable-detr-pp-r50": Config(DetectorConfig(backbone=BackboneConfig(fine_tune=True)), TrainConfig()),
}


def preset(name: str) -> Config:
    """The named configuration; ValueError lists the names that exist."""
    _require(name in PRESETS, "preset", f"one of {', '.join(PRESETS)}", name)
    return PRESETS[name]
