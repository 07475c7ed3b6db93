"""Frozen, validated configuration of the detector and of its training; presets are the YAML files in `presets`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from .data.transforms import TransformConfig
from .model.blocks import MemoryLevel

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
FORBID_OTHERS = ConfigDict(extra="forbid")
FIXED = {
    "detector": {"denoising_label_noise": 0.5, "denoising_box_noise": 1.0}
    | {"router_hidden_dim": 64, "router_gate_rank": 32},
    "train": {"match_class_weight": 2.0, "match_l1_weight": 5.0, "match_giou_weight": 2.0, "match_mask_weight": 5.0}
    | {"match_dice_weight": 5.0, "focal_alpha": 0.25, "focal_gamma": 2.0},
}
"""Fields of earlier versions, with the only value that they may have where a file still holds them."""

SETTINGS = "detector.backbone.settings"
NOT_THE_NETWORK = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder"),
    *("label2id", "model_type", "num_labels", "out_features", "out_indices", "output_attentions"),
    *("output_hidden_states", "problem_type", "return_dict", "stage_names", "transformers_version"),
}  # fmt: skip
"""Fields of every configuration of transformers that make no difference here, or are set here."""


@dataclass(frozen=True, config=FORBID_OTHERS)
class BackboneConfig:
    """A backbone of `transformers`; its last stages feed the detector."""

    model: str = "resnet"  # model type that has an `AutoBackbone`: resnet, swin, convnext, ...
    settings: dict[str, Any] = field(default_factory=dict)  # of that type's configuration; {} is ResNet-50 for resnet
    used_stages: PositiveInt = 3  # the last so many stages become feature levels
    fine_tune: bool = False  # for pretrained weights: BatchNorm fixed, `frozen` parameters not trained
    frozen: tuple[str, ...] = ("embedder.", "encoder.stages.0.")  # how names of parameters begin
    weights: str | None = None  # model name or folder for `from_pretrained`; None: initialised at random

    def resolved(self) -> PretrainedConfig:
        """The configuration of transformers that is meant; it takes any setting, so that the names are checked here.

        Raises ValueError for a model type without backbone, or a setting that it does not have or take.
        """
        if self.weights is None and self.model not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
            others = unknown_key(self.model, MODEL_FOR_BACKBONE_MAPPING_NAMES)
            raise ValueError(f"detector.backbone: expected a model of transformers with an AutoBackbone: {others}")
        configured = AutoConfig.for_model if self.weights is None else AutoConfig.from_pretrained
        try:
            model = configured(self.weights or self.model, **self.settings)
        except (ValueError, TypeError, OSError, StrictDataclassError) as error:
            field = "settings" if self.weights is None else f"weights: {self.weights}"
            raise ValueError(f"detector.backbone.{field}: {' '.join(str(error).split())[:300]}") from error
        if model.model_type not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
            raise ValueError(f"detector.backbone.weights: {self.weights}: a {model.model_type} has no AutoBackbone")
        known = setting_names(model)
        for key in sorted(self.settings.keys() - known):
            raise ValueError(unknown_key(f"{SETTINGS}.{key}", [f"{SETTINGS}.{name}" for name in sorted(known)]))
        return model

    def self_contained(self) -> BackboneConfig:
        """With the model and settings of its `weights`, so that it can be built without them; raises as `resolved`."""
        model = self.resolved()
        if self.weights is None:
            return self
        return dataclasses.replace(self, model=model.model_type, settings=settings_of(model))

    def known(self) -> BackboneConfig:
        """Without settings that its model does not have: checkpoints from before that was an error, and some
        config.json on hubs, hold some. They have never made a difference."""
        if self.model not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
            return self
        names = setting_names(AutoConfig.for_model(self.model))
        settings = {name: value for name, value in self.settings.items() if name in names}
        return dataclasses.replace(self, settings=settings)


@dataclass(frozen=True, config=FORBID_OTHERS)
class DetectorConfig:
    """Two-stage Deformable DETR, DAB or DINO, with routed decoder layers. docs/variants.md says who uses what."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: PositiveInt = 91
    embed_dim: Annotated[int, Field(gt=0, multiple_of=4)] = 256
    num_heads: PositiveInt = 8
    num_points: PositiveInt = 4
    num_levels: PositiveInt = 4
    encoder_layers: PositiveInt = 6
    decoder_layers: PositiveInt = 6
    num_queries: PositiveInt = 300
    ffn_dim: PositiveInt = 2048
    position_temperature: Positive = 10000.0  # of the image's sine embedding
    position_offset: float = 0.5  # of its pixels: 0.5 is their centre
    proposal_classes: Literal["agnostic", "all"] = "agnostic"  # what the first stage tells apart
    # Content of the first queries: a parameter (mixed query selection), the proposal's feature, a layer on the
    # proposal's box, or that layer jointly with the position.
    query_content: Literal["learned", "encoded", "box", "joint"] = "learned"
    # From the proposal's box, from each layer's reference box, or from that scaled by the content (DAB).
    query_position: Literal["proposal", "anchor", "scaled_anchor"] = "proposal"
    look_forward_twice: bool = False  # a layer's box loss reaches the layer before (DINO)
    decoder_norm: bool = False  # one LayerNorm before all heads (DINO)
    share_heads: bool = False  # one head for all decoder layers (DINO)
    denoising_pairs: NonNegativeInt = 0  # about so many noisy (positive, negative) queries an image; 0: none
    masks: bool = False
    route: bool = True
    routed_layers: str | tuple[NonNegativeInt, ...] = "last:2"  # "last:K", "all" or layer numbers from 0
    routed_queries: Literal["matching", "denoising", "both"] = "matching"  # whose attention gets the bias
    branches: Literal["packed", "two_pass"] = "packed"  # fork late, pack the branches; or run the decoder twice
    router_rank: PositiveInt = 16
    router_limit: Positive = 5.0
    router_nonnegative: bool = False
    router_frozen: bool = False  # the routers stay as they began
    # From this decoder layer on a query attends to itself and the more confident ones, in training and inference
    # (the masked self-attention of MDS-DETR, arXiv 2605.23507); 0: in none.
    causal_from: NonNegativeInt = 0
    memory: MemoryLevel = "lean"  # docs/memory.md says what each recomputes

    @field_validator("routed_layers", mode="before")
    @classmethod
    def _listed_layers(cls, value: Any) -> Any:
        """Layer numbers may be one number, or text such as "3,4"."""
        numbers = str(value).split(",") if isinstance(value, str | int) else [""]
        return tuple(map(int, numbers)) if all(map(str.isdecimal, numbers)) else value

    @model_validator(mode="after")
    def _fits_together(self) -> DetectorConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {self.embed_dim}, got {self.num_heads}")
        used = self.backbone.used_stages
        if self.num_levels < used:
            raise ValueError(f"num_levels: expected at least used_stages = {used}, got {self.num_levels}")
        if self.query_content == "joint" and self.query_position != "proposal":
            raise ValueError(f"query_position: expected 'proposal' with joint content, got {self.query_position!r}")
        if self.denoising_pairs and self.query_position == "proposal":
            raise ValueError("query_position: expected 'anchor' or 'scaled_anchor' with denoising, got 'proposal'")
        if self.causal_from >= self.decoder_layers:
            least = f"less than decoder_layers = {self.decoder_layers}"
            raise ValueError(f"causal_from: expected {least}, got {self.causal_from}")
        if self.causal_from and (self.route or self.denoising_pairs):
            raise ValueError("causal_from: expected 0 with routing or denoising; add detector.route=false")
        self.routed_layer_indices  # noqa: B018  (raises for a bad `routed_layers`)
        return self

    @property
    def routed_layer_indices(self) -> tuple[int, ...]:
        """The routed decoder layers, ascending; empty without routing."""
        routed, total = self.routed_layers, self.decoder_layers
        by_text = {
            "all": range(total),
            **{f"last:{count}": range(total - count, total) for count in range(1, total + 1)},
        }
        indices = by_text.get(routed, ()) if isinstance(routed, str) else sorted(set(routed))
        if not indices or max(indices) >= total:
            numbers = f"layer numbers from 0 to {total - 1}"
            raise ValueError(f"routed_layers: expected 'all', 'last:1' to 'last:{total}' or {numbers}, got {routed!r}")
        return tuple(indices) if self.route else ()


@dataclass(frozen=True, config=FORBID_OTHERS)
class ScheduleConfig:
    """lambda(t), the strength of the routing bias, and alpha(t), the weight of the auxiliary branch's losses.

    lambda is 0 through the warm-up, then rises over the ramp; alpha goes from its start to its end with it.
    """

    shape: Literal["constant", "linear", "cosine"] = "cosine"  # of the rise; constant: no ramp
    unit: Literal["epoch", "step"] = "epoch"  # of the four times below
    warmup: NonNegative = 1.0
    ramp: NonNegative = 4.0
    suppressor_until: NonNegative = 0.0  # the bias is the suppressor's alone until here,
    delegator_until: NonNegative = 0.0  # then the delegator's alone until here, then gated between them
    strength: NonNegative = 0.3
    layer_strengths: tuple[NonNegative, ...] = ()  # factor of each routed layer, first to last; (): 1 for all
    aux_start: NonNegative = 0.3
    aux_end: NonNegative = 0.7


@dataclass(frozen=True, config=FORBID_OTHERS)
class TrainConfig:
    """The public recipe: focal, L1 and GIoU losses, AdamW."""

    epochs: PositiveInt = 12
    batch_size: PositiveInt = 16
    accumulate: PositiveInt | None = None  # pieces that a process computes its part of a batch in; None: the launcher's
    learning_rate: Positive = 1e-4
    backbone_learning_rate_scale: NonNegative = 0.1
    sampling_learning_rate_scale: NonNegative = 0.1  # layers that give sampling offsets
    weight_decay: NonNegative = 1e-4
    clip_norm: Positive = 0.1
    warmup_steps: NonNegativeInt = 0  # the learning rate rises linearly over so many steps
    drop_at: Annotated[float, Field(gt=0, le=1)] = 10 / 12  # fraction of the run after which the rate is x0.1
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 2
    steps: PositiveInt | None = None  # after which training ends, in place of `epochs`
    time_budget: Positive | None = None  # seconds after which training ends, whatever `epochs` and `steps` say
    eval_every: PositiveInt = 1  # epochs
    eval_steps: PositiveInt | None = None  # an evaluation inside an epoch after so many steps, too; None: none
    log_every: PositiveInt = 20  # steps
    checkpoint_every: PositiveInt = 200  # steps; and at the end of each epoch
    top_k: PositiveInt = 100  # detections of an image
    class_weight: NonNegative = 1.0
    l1_weight: NonNegative = 5.0
    giou_weight: NonNegative = 2.0
    mask_weight: NonNegative = 5.0  # of masks (Mask2Former's), for a detector that has them
    dice_weight: NonNegative = 5.0
    mask_points: PositiveInt = 12544  # at which a mask is compared

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of a run that no time budget ends before."""
        return self.steps or self.epochs * steps_per_epoch


@dataclass(frozen=True, config=FORBID_OTHERS)
class Config:
    """Everything that decides a run; a round trip through JSON or YAML gives an equal object."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    transforms: TransformConfig = field(default_factory=TransformConfig)

    @model_validator(mode="after")
    def _a_strength_for_each_routed_layer(self) -> Config:
        given, routed = len(self.schedule.layer_strengths), len(self.detector.routed_layer_indices)
        if given not in (0, routed) and self.detector.route:
            raise ValueError(f"schedule.layer_strengths: expected none or {routed} numbers, got {given}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary that `json` and `yaml` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`; missing keys take the defaults. ValueError names a bad value, or the key nearest to
        an unknown one."""
        try:
            return TypeAdapter(cls).validate_python(_without_fixed(values))
        except ValidationError as error:
            raise ValueError(first_error(error)) from None

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> the value here and the value there, of every field in which two configurations differ."""
        mine, others = (dict(leaves(config.to_dict())) for config in (self, other))
        both = {key: (mine.get(key), others.get(key)) for key in mine | others}
        return {key: values for key, values in both.items() if values[0] != values[1]}

    def updated(self, changes: Mapping[str, Any]) -> Config:
        """A copy with dotted keys replaced, as `{"train.epochs": 3}`; ValueError as `from_dict`."""
        values = self.to_dict()
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {}) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                raise ValueError(unknown_key(dotted))
            section[last] = value
        return Config.from_dict(values)


def setting_names(model: PretrainedConfig) -> set[str]:
    """Fields of a model type's configuration that make a difference to the network."""
    return {*type(model)().to_dict(), *model.attribute_map} - NOT_THE_NETWORK


def settings_of(model: PretrainedConfig) -> dict[str, Any]:
    """The settings that make the network, where they differ from the defaults of its type."""
    values, defaults = model.to_dict(), type(model)().to_dict()
    return {name: values[name] for name in sorted(setting_names(model)) if values.get(name) != defaults.get(name)}


def _without_fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(values)
    for section, fixed in FIXED.items():
        if isinstance(values.get(section), Mapping):
            for name in fixed.keys() & values[section].keys():
                given = values[section][name]
                if str(given) not in (str(fixed[name]), f"{fixed[name]:g}"):
                    raise ValueError(f"{section}.{name}: expected {fixed[name]}, which is fixed now, got {given!r}")
            values[section] = {name: value for name, value in values[section].items() if name not in fixed}
    return values


def first_error(error: ValidationError) -> str:
    """One sentence of the first thing that pydantic found."""
    first = error.errors()[0]
    # A union adds the types that it tried to the location; the names of fields are what a reader looks for.
    key = ".".join(str(part) for part in first["loc"] if "[" not in str(part) and part != "str")
    if first["type"] == "unexpected_keyword_argument":
        return unknown_key(key)
    if first["type"] == "value_error":
        return f"{key}{'.' if key else ''}{first['ctx']['error']}"
    return f"{key or 'config'}: {first['msg']}, got {first['input']!r}"


def unknown_key(key: str, dotted_keys: Iterable[str] | None = None) -> str:
    """The error for a dotted key that is none of these (the fields of `Config`); names the nearest by its last part."""
    known = {dotted.rpartition(".")[2]: dotted for dotted in dotted_keys or _dotted_keys(Config().to_dict())}
    section, _, last = key.rpartition(".")
    nearest = difflib.get_close_matches(last, known, n=1)
    others = ", ".join(name for name, dotted in known.items() if dotted.rpartition(".")[0] == section)
    return f"unknown key {key!r}; " + (f"did you mean {known[nearest[0]]!r}?" if nearest else f"keys there: {others}")


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name != "detector.backbone.settings":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{name}.")


PRESETS = tuple(sorted(file.name.removesuffix(".yaml") for file in (files(__package__) / "presets").iterdir()))


def preset(name: str) -> Config:
    """The named configuration; ValueError lists the names that exist."""
    return Config.from_dict(_preset_values(name))


def load_config(path: str | Path) -> Config:
    """A YAML file of sections and fields; `base: PRESET` names what it changes (without: the defaults).

    Raises FileNotFoundError, or ValueError that names the file and the key.
    """
    try:
        return Config.from_dict(_with_base(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _preset_values(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return _with_base(yaml.safe_load((files(__package__) / "presets" / f"{name}.yaml").read_text(encoding="utf-8")))


def _with_base(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"expected sections such as 'detector:' with fields below, got {values!r}")
    base = values.pop("base", None)
    return values if base is None else _merged(_preset_values(base), values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = [key for key in changes if isinstance(base.get(key), dict) and isinstance(changes[key], dict)]
    return {**base, **changes, **{key: _merged(base[key], changes[key]) for key in both}}
