"""Public checkpoints of the Deformable DETR family in this package: names and layouts change, no value does.

Sources: Deformable DETR (arXiv 2010.04159), DINO (arXiv 2203.03605) and Dual-R-DETR (arXiv 2512.13876) as their authors
publish them, and `DeformableDetrForObjectDetection` of `transformers`.
"""

from __future__ import annotations

import argparse
import codecs
import datetime
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeformableDetrConfig, PretrainedConfig

from route_detr.config import Config, preset, settings_of
from route_detr.model.detector import Detector
from route_detr.run import why_unreadable

Rules = Mapping[str, str | Callable[..., str]]

# Whole source names and what they become. "#k" marks part k of a tensor, "{a,b,c}" the equal parts that a tensor falls
# into, and "" what has no place here.
RESNET: Rules = {  # as torchvision and timm name it
    r"conv1\.(.+)": r"embedder.embedder.convolution.\1",
    r"bn1\.(.+)": r"embedder.embedder.normalization.\1",
    r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.+)": lambda stage, block, kind, layer, tail: (
        f"encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(layer) - 1}."
        f"{'convolution' if kind == 'conv' else 'normalization'}.{tail}"
    ),
    r"layer(\d)\.(\d+)\.downsample\.([01])\.(.+)": lambda stage, block, part, tail: (
        f"encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{('convolution', 'normalization')[int(part)]}.{tail}"
    ),
    r"fc\..+": "",
}
SWIN: Rules = {  # as its authors name it
    r"patch_embed\.proj\.(.+)": r"swin.embeddings.patch_embeddings.projection.\1",
    r"patch_embed\.norm\.(.+)": r"swin.embeddings.norm.\1",
    r"(layers\.\d\.blocks\.\d+)\.attn\.qkv\.(.+)": r"swin.encoder.\1.attention.{q_proj,k_proj,v_proj}.\2",
    r"(layers\.\d\.blocks\.\d+)\.attn\.proj\.(.+)": r"swin.encoder.\1.attention.o_proj.\2",
    r"(layers\.\d\.blocks\.\d+)\.attn\.(relative_position_bias)_table": r"swin.encoder.\1.attention.\2.\2_table",
    r"layers\.\d\.blocks\.\d+\.attn\.relative_position_index": "",
    r"(layers\.\d\.blocks\.\d+)\.norm1\.(.+)": r"swin.encoder.\1.layernorm_before.\2",
    r"(layers\.\d\.blocks\.\d+)\.norm2\.(.+)": r"swin.encoder.\1.layernorm_after.\2",
    r"(layers\.\d\.(?:blocks\.\d+\.mlp|downsample)\..+)": r"swin.encoder.\1",
    r"norm(\d)\.(.+)": lambda stage, tail: f"hidden_states_norms.stage{int(stage) + 1}.{tail}",
}
AUTHORS: Rules = {
    r"(?:input_proj|neck\.convs)\.(.+)": r"feature_levels.projections.\1",
    r"transformer\.level_embeds?": "encoder.level_embedding",
    r"transformer\.encoder\.(layers\.\d+)\.self_attn\.(.+)": r"encoder.\1.attention.\2",
    r"transformer\.encoder\.(layers\.\d+)\.norm1\.(.+)": r"encoder.\1.attention_norm.\2",
    r"transformer\.encoder\.(layers\.\d+)\.norm2\.(.+)": r"encoder.\1.ffn_norm.\2",
    r"transformer\.decoder\.(layers\.\d+)\.self_attn\.(.+)": r"decoder.\1.self_attention.\2",
    r"transformer\.decoder\.(layers\.\d+)\.cross_attn\.(.+)": r"decoder.\1.cross_attention.\2",
    r"transformer\.decoder\.(layers\.\d+)\.norm1\.(.+)": r"decoder.\1.cross_norm.\2",
    r"transformer\.decoder\.(layers\.\d+)\.norm2\.(.+)": r"decoder.\1.self_norm.\2",
    r"transformer\.decoder\.(layers\.\d+)\.norm3\.(.+)": r"decoder.\1.ffn_norm.\2",
    r"transformer\.((?:en|de)coder\.layers\.\d+)\.linear1\.(.+)": r"\1.ffn.0.\2",
    r"transformer\.((?:en|de)coder\.layers\.\d+)\.linear2\.(.+)": r"\1.ffn.2.\2",
    r"transformer\.decoder\.layers\.(\d+)\.query_router\.(.+)": r"decoder.routers.\1.\2",
    r"transformer\.decoder\.norm\.(.+)": r"decoder.norm.\1",
    r"transformer\.decoder\.ref_point_head\.layers\.0\.(.+)": r"decoder.anchor.0.\1",
    r"transformer\.decoder\.ref_point_head\.layers\.1\.(.+)": r"decoder.anchor.2.\1",
    r"transformer\.decoder\.ref_point_head\.([01]\..+)": r"proposals.position.\1",
    r"transformer\.enc_output\.(.+)": r"proposals.project.0.\1",
    r"transformer\.enc_output_norm\.(.+)": r"proposals.project.1.\1",
    r"transformer\.pos_trans\.(.+)": r"proposals.content.0.\1",
    r"transformer\.pos_trans_norm\.(.+)": r"proposals.content.1.\1",
    r"transformer\.tgt_embed\.weight": "proposals.content",
    r"label_enc\.weight": "denoising.content.weight",
    r"transformer\.(?:encoder_class_head|enc_out_class_embed)\.(.+)": r"proposals.head.classify.\1",
    r"transformer\.(?:encoder_bbox_head|enc_out_bbox_embed)\.layers\.(\d)\.(.+)": r"proposals.head.refine.\1.\2",
    # Heads have two names, here and below, for the same tensors; a file may have either or both.
    r"(?:transformer\.decoder\.)?class_(?:head|embed)\.(\d+\..+)": r"heads.classify.\1",
    r"(?:transformer\.decoder\.)?bbox_(?:head|embed)\.(\d+)\.layers\.(\d\..+)": r"heads.refine.\1.\2",
    r"_classes_|criterion\..+": "",
}
TRANSFORMERS: Rules = {
    r"model\.input_proj\.(.+)": r"feature_levels.projections.\1",
    r"model\.level_embed": "encoder.level_embedding",
    r"model\.encoder\.(layers\.\d+)\.self_attn\.(.+)": r"encoder.\1.attention.\2",
    r"model\.encoder\.(layers\.\d+)\.self_attn_layer_norm\.(.+)": r"encoder.\1.attention_norm.\2",
    r"model\.decoder\.(layers\.\d+)\.self_attn\.q_proj\.(.+)": r"decoder.\1.self_attention.in_proj_\2#0",
    r"model\.decoder\.(layers\.\d+)\.self_attn\.k_proj\.(.+)": r"decoder.\1.self_attention.in_proj_\2#1",
    r"model\.decoder\.(layers\.\d+)\.self_attn\.v_proj\.(.+)": r"decoder.\1.self_attention.in_proj_\2#2",
    r"model\.decoder\.(layers\.\d+)\.self_attn\.(?:o|out)_proj\.(.+)": r"decoder.\1.self_attention.out_proj.\2",
    r"model\.decoder\.(layers\.\d+)\.self_attn_layer_norm\.(.+)": r"decoder.\1.self_norm.\2",
    r"model\.decoder\.(layers\.\d+)\.encoder_attn\.(.+)": r"decoder.\1.cross_attention.\2",
    r"model\.decoder\.(layers\.\d+)\.encoder_attn_layer_norm\.(.+)": r"decoder.\1.cross_norm.\2",
    r"model\.((?:en|de)coder\.layers\.\d+)\.(?:mlp\.)?fc1\.(.+)": r"\1.ffn.0.\2",
    r"model\.((?:en|de)coder\.layers\.\d+)\.(?:mlp\.)?fc2\.(.+)": r"\1.ffn.2.\2",
    r"model\.((?:en|de)coder\.layers\.\d+)\.final_layer_norm\.(.+)": r"\1.ffn_norm.\2",
    r"model\.enc_output\.(.+)": r"proposals.project.0.\1",
    r"model\.enc_output_norm\.(.+)": r"proposals.project.1.\1",
    r"model\.pos_trans\.(.+)": r"proposals.content.0.\1",
    r"model\.pos_trans_norm\.(.+)": r"proposals.content.1.\1",
    r"(?:model\.decoder\.)?class_embed\.(\d+\..+)": r"heads.classify.\1",
    r"(?:model\.decoder\.)?bbox_embed\.(\d+)\.layers\.(\d\..+)": r"heads.refine.\1.\2",
}
BACKBONE = re.compile(
    r"(?:model\.backbone\.(?:conv_encoder\.)?model(?:\._backbone)?|backbone\.0(?:\.body)?|backbone)\.(.+)"
)


NUMPY = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.empty(0).__reduce__()[0]}
PATHS = {f"{pure}{kind}Path": PurePosixPath for pure in ("", "Pure") for kind in ("Posix", "Windows")}
# Types in public checkpoints beside tensors: arguments, times, numbers of numpy, paths. None of them runs anything.
# numpy has moved its functions, and Python its paths: old files have the old names.
HARMLESS: list[Any] = [
    *(argparse.Namespace, SimpleNamespace, dict, list, set, frozenset, range, slice, int, float, str),
    (lambda *factory: {}, "collections.defaultdict"),  # torch.load fills no other kind of dictionary
    *(datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone),
    *(codecs.encode, np.ndarray, np.dtype, *(type(np.dtype(code)) for code in np.typecodes["All"])),
    *((made_by, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, made_by in NUMPY.items()),
    *((path, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name, path in PATHS.items()),
]


def read_published(source: str) -> tuple[dict[str, Tensor], Config, dict[int, str]]:
    """State dict, configuration and class names of a public checkpoint.

    source: an author's file; or a `transformers` model, as a folder with config.json and its weights or a hub id.

    Raises FileNotFoundError, or ValueError for a file that is none of these or a model that is no such detector.
    """
    path = Path(source)
    if path.is_file():
        state = _torch_file(path)
        return state, source_config(state), {}
    if not path.is_dir():
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise FileNotFoundError(f"{source}: no such file or folder, and not the name of a model on a hub")
        patterns = ["config.json", "*.safetensors", "pytorch_model.bin"]
        path = Path(snapshot_download(source, allow_patterns=patterns))
    config = DeformableDetrConfig.from_pretrained(path)
    if config.model_type != json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type"):
        raise ValueError(f"{source}: expected a model of type {config.model_type}")
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model.bin"))
    if not files:
        raise FileNotFoundError(f"{source}: neither *.safetensors nor pytorch_model.bin in it")
    state = {}
    for file in files:
        state |= load_file(file) if file.suffix == ".safetensors" else _torch_file(file)
    return state, transformers_config(config), {int(label): name for label, name in config.id2label.items()}


def _torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save; nothing in it is run, and what is no tensor is left out."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or damaged file can fail anywhere inside the unpickler
        raise ValueError(f"{path}: expected tensors written by torch.save: {why_unreadable(error)}") from error
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: expected a state dict, alone or under 'model'")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def imported(state: Mapping[str, Tensor], config: Config) -> Detector:
    """The detector of `config` with the weights of a public checkpoint.

    state: names and tensors as published (of Deformable DETR, Dual-R-DETR, DINO or transformers). Routers are new where
    the checkpoint has none; routers of layers that `config` does not route are left out. A class-agnostic first stage
    takes the first class of a head that ranks by it.

    Raises ValueError that names tensors without a place, places without a tensor, or a shape that does not fit.
    """
    detector = Detector(config.detector)
    fresh = detector.state_dict()
    found = _laid_out(_renamed(state), config, fresh)
    _check_complete(found, fresh)
    detector.load_state_dict({name: found.get(name, tensor) for name, tensor in fresh.items()})
    return detector


def source_config(state: Mapping[str, Tensor]) -> Config:
    """The preset that a checkpoint published by its authors was trained with, sized by its tensors.

    Raises ValueError for one that is of neither Deformable DETR, Dual-R-DETR nor DINO, two-stage with box refinement.
    """
    names = state.keys()
    if "transformer.tgt_embed.weight" in names:
        name = "dino-swin-l" if any("relative_position_bias" in name for name in names) else "dino-r50"
        changes: dict[str, Any] = {"num_queries": len(state["transformer.tgt_embed.weight"])}
    elif "transformer.pos_trans.weight" in names:
        name, separate = "deformable-detr-pp-r50", any("ref_point_head" in name for name in names)
        changes = {"query_content": "box" if separate else "joint"}
    else:
        raise ValueError(
            "state: expected two-stage Deformable DETR, Dual-R-DETR or DINO weights, got no pos_trans or tgt_embed"
        )
    heads = ("transformer.decoder.class_head.0.bias", "class_embed.0.bias")
    head = next(name for name in names if name in heads)
    changes |= {
        "num_classes": len(state[head]),
        "ffn_dim": len(state["transformer.encoder.layers.0.linear1.bias"]),
        "route": any(".query_router." in name for name in names),
    }
    return preset(name).updated({f"detector.{key}": value for key, value in changes.items()})


def transformers_config(source: PretrainedConfig) -> Config:
    """The configuration of a `transformers.DeformableDetrConfig`.

    Raises ValueError for what this detector does not have: one stage, no box refinement, learned positions, encoder and
    decoder layers of different widths, a backbone that is neither of transformers nor timm's plain ResNet-50 or 101.
    """
    expected = {"two_stage": True, "with_box_refine": True}
    expected |= {"position_embedding_type": "sine", "activation_function": "relu"}
    for field in ("attention_heads", "ffn_dim", "n_points"):
        expected[f"decoder_{field}"] = getattr(source, f"encoder_{field}")
    for name, value in expected.items():
        if getattr(source, name) != value:
            raise ValueError(f"{name}: expected {value!r}, got {getattr(source, name)!r}")
    if source.d_model % 128:
        raise ValueError(f"d_model: expected a multiple of 128 (32 groups a level, as there), got {source.d_model}")
    detector = {
        "backbone": _backbone_config(source.backbone_config),
        "num_classes": source.num_labels,
        "embed_dim": source.d_model,
        "num_heads": source.encoder_attention_heads,
        "num_points": source.encoder_n_points,
        "num_levels": source.num_feature_levels,
        "encoder_layers": source.encoder_layers,
        "decoder_layers": source.decoder_layers,
        "num_queries": source.two_stage_num_proposals,
        "ffn_dim": source.encoder_ffn_dim,
        "query_content": "joint",
        "route": False,
    }
    return Config.from_dict({"detector": detector})


def _backbone_config(source: PretrainedConfig) -> dict[str, Any]:
    timm_depths = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}
    if getattr(source, "backbone", None) in timm_depths:
        return {"settings": {"depths": timm_depths[source.backbone]}, "fine_tune": True}
    stages, used = getattr(source, "stage_names", None), getattr(source, "out_features", None)
    if not stages or not used or used != stages[-len(used) :]:
        raise ValueError(
            f"backbone_config: expected a backbone of transformers that gives its last stages, got {source}"
        )
    found = {"model": source.model_type, "settings": settings_of(source), "used_stages": len(used)}
    return found | {"fine_tune": True, "frozen": []}


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rules = TRANSFORMERS if any(name.startswith("model.") for name in state) else AUTHORS
    renamed: dict[str, Tensor] = {}
    unknown = []
    for source, tensor in state.items():
        name = _our_name(source, rules)
        if name is None:
            unknown.append(source)
        elif "{" in name:
            before, parts, after = re.fullmatch(r"(.*)\{(.*)\}(.*)", name).groups()
            names = parts.split(",")
            pieces = zip(names, tensor.chunk(len(names)), strict=True)
            renamed |= {before + part + after: piece for part, piece in pieces}
        elif name:
            renamed[name] = tensor
    if unknown:
        raise ValueError(f"state: no place for {len(unknown)} tensors: {', '.join(unknown[:5])}")
    for name in [name for name in renamed if name.endswith("#0")]:
        parts = [renamed.pop(f"{name[:-1]}{part}") for part in range(3)]
        renamed[name[:-2]] = torch.cat(parts)
    return renamed


def _our_name(source: str, rules: Rules) -> str | None:
    """Empty where the tensor has no place here on purpose, None where no rule knows it."""
    backbone = BACKBONE.fullmatch(source)
    if backbone is None:
        return _by_rule(source, rules)
    inner = _by_rule(backbone[1], {**RESNET, **SWIN})
    return "" if inner == "" else f"backbone.body.{backbone[1] if inner is None else inner}"


def _by_rule(source: str, rules: Rules) -> str | None:
    for pattern, ours in rules.items():
        if found := re.fullmatch(pattern, source):
            return found.expand(ours) if isinstance(ours, str) else ours(*found.groups())
    return None


def _laid_out(found: dict[str, Tensor], config: Config, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names in our layouts."""
    detector, layers = config.detector, config.detector.decoder_layers
    shared = detector.share_heads
    result: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if head := re.fullmatch(r"heads\.(classify|refine)\.(\d+)\.(.+)", name):
            kind, layer, tail = head[1], int(head[2]), head[3]
            if shared and 0 < layer < layers:
                continue  # the same tensors as those of layer 0
            name = f"proposals.head.{kind}.{tail}" if layer == layers else f"decoder.heads.{layer}.{kind}.{tail}"
        if refine := re.fullmatch(r"(.+\.refine)\.(\d)\.(.+)", name):
            name = f"{refine[1]}.{2 * int(refine[2])}.{refine[3]}"
        router = re.fullmatch(r"decoder\.routers\.(\d+)\..+", name)
        if router and int(router[1]) not in detector.routed_layer_indices:
            continue
        result[name] = tensor
    agnostic = detector.proposal_classes == "agnostic"
    for name in ("proposals.head.classify.weight", "proposals.head.classify.bias"):
        if agnostic and name in result:
            result[name] = result[name][:1]
    if "decoder.anchor.0.weight" in result:  # its authors embed (cy, cx, w, h)
        y, x, width, height = result["decoder.anchor.0.weight"].chunk(4, 1)
        result["decoder.anchor.0.weight"] = torch.cat([x, y, width, height], 1)
    if "denoising.content.weight" in result:  # a row more than there are classes
        result["denoising.content.weight"] = result["denoising.content.weight"][: detector.num_classes]
    for name in fresh:  # a neck without biases
        if re.fullmatch(r"feature_levels\.projections\.\d\.0\.bias", name):
            result.setdefault(name, torch.zeros_like(fresh[name]))
    return result


def _check_complete(found: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    # Buffers and routers of our own, and a norm of Swin's classifier that no backbone uses.
    made_here = re.compile(
        r"routing\..+|decoder\.routers\..+|backbone\..+\.num_batches_tracked|backbone\.body\.swin\.layernorm\..+"
    )
    unexpected = sorted(found.keys() - fresh.keys())
    missing = sorted(name for name in fresh.keys() - found.keys() if not made_here.fullmatch(name))
    for problem, names in (("no place for", unexpected), ("nothing for", missing)):
        if names:
            raise ValueError(f"state: {problem} {len(names)} tensors: {', '.join(names[:5])}; does the preset fit?")
    for name, tensor in found.items():
        if tensor.shape != fresh[name].shape:
            raise ValueError(f"state: expected {name} {list(fresh[name].shape)}, got {list(tensor.shape)}")
