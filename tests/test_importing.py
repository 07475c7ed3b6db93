"""Public checkpoints: converted transformers models give the same results; every published name finds its place."""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import os
import re
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from small_training import write_data
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from route_detr.cli import main
from route_detr.config import DetectorConfig, preset
from route_detr.errors import CheckpointError
from route_detr.model.detector import Detector
from route_detr.predict import load_trained, stored_config
from route_detr.run import load_checkpoint, save_checkpoint
from route_detr.scale_out import take_weights
from route_detr.tools.importing import imported, read_published, source_config, transformers_config


def taken(detector, checkpoint, names, **how):
    return take_weights(detector, checkpoint, load_checkpoint(checkpoint), names, **how)


def small_transformers_model(**changes) -> DeformableDetrForObjectDetection:
    """Randomly initialised, then perturbed, so that no bias is 0 and no two layers are alike."""
    torch.manual_seed(0)
    stages = {"embedding_size": 8, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 2, 1, 1]}
    values = {
        "backbone_config": ResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"]),
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "two_stage": True,
        "with_box_refine": True,
        "two_stage_num_proposals": 20,
        "num_labels": 5,
        "dropout": 0.0,
    }
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(**{**values, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("padded", [False, True])
def test_a_converted_transformers_model_gives_the_same_logits_and_boxes(padded):
    model = small_transformers_model()
    detector = imported(model.state_dict(), transformers_config(model.config)).eval()
    images = torch.randn(2, 3, 96, 128)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    if padded:
        padding[1, 64:], padding[1, :, 96:] = True, True
        images = images.masked_fill(padding[:, None], 0.0)
    with torch.no_grad():
        theirs = model(images, pixel_mask=(~padding).long())
        ours = detector(images, padding if padded else None)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.boxes, theirs.pred_boxes, rtol=0, atol=1e-4)
    assert ours.logits.std() > 0.01, "a constant output would agree with anything"


def test_older_names_and_timm_backbones_of_transformers_find_their_places():
    model = small_transformers_model()
    config = transformers_config(model.config)
    older = {
        re.sub(r"\.mlp\.(fc\d)", r".\1", name)
        .replace("self_attn.o_proj", "self_attn.out_proj")
        .replace("model.backbone.model.", "model.backbone.conv_encoder.model."): tensor
        for name, tensor in model.state_dict().items()
    }
    assert older.keys() != model.state_dict().keys()
    expected = imported(model.state_dict(), config).state_dict()
    for name, tensor in imported(older, config).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"two_stage": False}, "two_stage"),
        ({"with_box_refine": False, "two_stage": False}, "two_stage"),
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"decoder_ffn_dim": 32}, "decoder_ffn_dim"),
        ({"d_model": 64}, "d_model"),
    ],
)
def test_what_this_detector_does_not_have_is_refused_by_name(changes, named):
    config = DeformableDetrConfig(**{"two_stage": True, "with_box_refine": True, **changes})
    with pytest.raises(ValueError, match=named):
        transformers_config(config)


# ---- state dicts with the names and shapes that the authors published -----------------------------------------------


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def deformable_attention(name: str, dim: int, heads: int, levels: int, points: int) -> dict[str, tuple[int, ...]]:
    samples = heads * levels * points
    return {
        **linear(f"{name}.sampling_offsets", dim, 2 * samples),
        **linear(f"{name}.attention_weights", dim, samples),
        **linear(f"{name}.value_proj", dim, dim),
        **linear(f"{name}.output_proj", dim, dim),
    }


def transformer(dim: int, ffn: int, heads: int, levels: int, encoder: int, decoder: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(encoder):
        layer = f"transformer.encoder.layers.{i}"
        shapes |= deformable_attention(f"{layer}.self_attn", dim, heads, levels, 4)
        shapes |= norm(f"{layer}.norm1", dim) | norm(f"{layer}.norm2", dim)
        shapes |= linear(f"{layer}.linear1", dim, ffn) | linear(f"{layer}.linear2", ffn, dim)
    for i in range(decoder):
        layer = f"transformer.decoder.layers.{i}"
        shapes |= deformable_attention(f"{layer}.cross_attn", dim, heads, levels, 4)
        shapes |= {f"{layer}.self_attn.in_proj_weight": (3 * dim, dim), f"{layer}.self_attn.in_proj_bias": (3 * dim,)}
        shapes |= linear(f"{layer}.self_attn.out_proj", dim, dim)
        shapes |= norm(f"{layer}.norm1", dim) | norm(f"{layer}.norm2", dim) | norm(f"{layer}.norm3", dim)
        shapes |= linear(f"{layer}.linear1", dim, ffn) | linear(f"{layer}.linear2", ffn, dim)
    return shapes | linear("transformer.enc_output", dim, dim) | norm("transformer.enc_output_norm", dim)


def mlp(name: str, widths: list[int]) -> dict[str, tuple[int, ...]]:
    pairs = itertools.pairwise(widths)
    return {k: v for i, (a, b) in enumerate(pairs) for k, v in linear(f"{name}.layers.{i}", a, b).items()}


def resnet50(prefix: str) -> dict[str, tuple[int, ...]]:
    def frozen(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}

    shapes = {f"{prefix}conv1.weight": (64, 3, 7, 7), **frozen(f"{prefix}bn1", 64)}
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"{prefix}layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, inputs, 1, 1)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            for i, channels in enumerate((width, width, 4 * width), 1):
                shapes |= frozen(f"{name}.bn{i}", channels)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                shapes |= frozen(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes


def swin_large(prefix: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}patch_embed.proj.weight": (192, 3, 4, 4)}
    shapes |= {f"{prefix}patch_embed.proj.bias": (192,), **norm(f"{prefix}patch_embed.norm", 192)}
    for stage, (blocks, heads) in enumerate(((2, 6), (2, 12), (18, 24), (2, 48))):
        width = 192 << stage
        for block in range(blocks):
            name = f"{prefix}layers.{stage}.blocks.{block}"
            shapes |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
            shapes |= linear(f"{name}.attn.qkv", width, 3 * width) | linear(f"{name}.attn.proj", width, width)
            shapes[f"{name}.attn.relative_position_bias_table"] = (23 * 23, heads)
            shapes[f"{name}.attn.relative_position_index"] = (144, 144)
            shapes |= linear(f"{name}.mlp.fc1", width, 4 * width) | linear(f"{name}.mlp.fc2", 4 * width, width)
        if stage < 3:
            shapes[f"{prefix}layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= norm(f"{prefix}layers.{stage}.downsample.norm", 4 * width)
        if stage > 0:
            shapes |= norm(f"{prefix}norm{stage}", width)
    return shapes


def neck(name: str, channels: list[int], biased: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for level, (width, kernel) in enumerate([*((c, 1) for c in channels), (channels[-1], 3)]):
        shapes[f"{name}.{level}.0.weight"] = (256, width, kernel, kernel)
        if biased:
            shapes[f"{name}.{level}.0.bias"] = (256,)
        shapes |= norm(f"{name}.{level}.1", 256)
    return shapes


def heads(class_name: str, box_name: str, count: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(count):
        shapes |= linear(f"{class_name}.{i}", 256, 91) | mlp(f"{box_name}.{i}", [256, 256, 256, 4])
    return shapes


def deformable_detr() -> dict[str, tuple[int, ...]]:
    """fundamentalvision/Deformable-DETR, two-stage with box refinement; FFN of 1024."""
    return {
        **transformer(256, 1024, 8, 4, 6, 6),
        "transformer.level_embed": (4, 256),
        **linear("transformer.pos_trans", 512, 512),
        **norm("transformer.pos_trans_norm", 512),
        **heads("class_embed", "bbox_embed", 7),
        **heads("transformer.decoder.class_embed", "transformer.decoder.bbox_embed", 7),
        **neck("input_proj", [512, 1024, 2048], True),
        **resnet50("backbone.0.body."),
    }


def dual_r_detr() -> dict[str, tuple[int, ...]]:
    """The public Dual-R-DETR code, Deformable-DETR++ with a router in every decoder layer."""
    shapes = {
        **transformer(256, 2048, 8, 4, 6, 6),
        "transformer.level_embeds": (4, 256),
        **linear("transformer.encoder_class_head", 256, 91),
        **mlp("transformer.encoder_bbox_head", [256, 256, 256, 4]),
        **linear("transformer.pos_trans", 512, 256),
        **norm("transformer.pos_trans_norm", 256),
        **linear("transformer.decoder.ref_point_head.0", 512, 256),
        **norm("transformer.decoder.ref_point_head.1", 256),
        **heads("transformer.decoder.class_head", "transformer.decoder.bbox_head", 6),
        **neck("neck.convs", [512, 1024, 2048], False),
        **resnet50("backbone."),
    }
    for i in range(6):
        router = f"transformer.decoder.layers.{i}.query_router"
        shapes |= linear(f"{router}.router_phi.0", 256, 64) | linear(f"{router}.router_phi.2", 64, 16)
        for name in ("U_sup", "V_sup", "U_del", "V_del"):
            shapes[f"{router}.router_{name}.weight"] = (16, 16)
        shapes |= {f"{router}.selector_{side}.weight": (32, 3) for side in "ab"}
        shapes |= {f"{router}.router_gamma_{kind}": () for kind in ("sup", "del")}
    return shapes


def dino(swin: bool) -> dict[str, tuple[int, ...]]:
    """IDEA-Research/DINO, 4 scales."""
    return {
        **transformer(256, 2048, 8, 4, 6, 6),
        "transformer.level_embed": (4, 256),
        "transformer.tgt_embed.weight": (900, 256),
        "label_enc.weight": (92, 256),
        **norm("transformer.decoder.norm", 256),
        **mlp("transformer.decoder.ref_point_head", [512, 256, 256]),
        **linear("transformer.enc_out_class_embed", 256, 91),
        **mlp("transformer.enc_out_bbox_embed", [256, 256, 256, 4]),
        **heads("class_embed", "bbox_embed", 6),
        **heads("transformer.decoder.class_embed", "transformer.decoder.bbox_embed", 6),
        **neck("input_proj", [384, 768, 1536] if swin else [512, 1024, 2048], True),
        **(swin_large("backbone.0.") if swin else resnet50("backbone.0.body.")),
    }


PUBLISHED = {
    "deformable-detr": deformable_detr,
    "dual-r-detr": dual_r_detr,
    "dino-r50": lambda: dino(swin=False),
    "dino-swin-l": lambda: dino(swin=True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_name_finds_its_place_and_every_place_its_tensor(name):
    """`imported` refuses tensors without a place and places without a tensor; without values here, at full size."""
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in PUBLISHED[name]().items()}
        config = source_config(state)
        detector = imported(state, config)
    assert config.detector.route == (name == "dual-r-detr")
    assert list(detector.decoder.routers) == (["4", "5"] if name == "dual-r-detr" else [])
    assert detector.config.num_queries == (900 if "dino" in name else 300)


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Heads with two names are one tensor, as in the files."""
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    return {key: state.get(key.removeprefix("transformer.decoder."), tensor) for key, tensor in state.items()}


def test_what_changes_its_layout_does_so():
    state = random_state(dino(swin=False))
    detector = imported(state, source_config(state))
    authors, ours = state["transformer.decoder.ref_point_head.layers.0.weight"], detector.decoder.anchor[0].weight
    assert torch.equal(ours[:, :128], authors[:, 128:256]) and torch.equal(ours[:, 128:256], authors[:, :128])
    assert torch.equal(ours[:, 256:], authors[:, 256:])
    assert torch.equal(detector.denoising.content.weight, state["label_enc.weight"][:91])
    assert torch.equal(detector.decoder.heads[0].refine[4].bias, state["bbox_embed.0.layers.2.bias"])
    assert torch.equal(detector.decoder.layers[2].cross_norm.weight, state["transformer.decoder.layers.2.norm1.weight"])
    assert torch.equal(detector.decoder.layers[2].self_norm.weight, state["transformer.decoder.layers.2.norm2.weight"])


def test_routers_are_new_where_the_checkpoint_has_none_and_a_first_stage_ranks_by_the_first_class():
    state = random_state(deformable_detr())
    detector = imported(state, source_config(state).updated({"detector.route": True}))
    assert list(detector.decoder.routers) == ["4", "5"]
    assert all(router.router_U_sup.weight.abs().sum() > 0 for router in detector.decoder.routers.values())
    assert torch.equal(detector.proposals.head.classify.weight, state["class_embed.6.weight"][:1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"transformer.other.weight": (1,)}, "transformer.other.weight"),
        ({"transformer.enc_output.bias": None}, "proposals.project.0.bias"),
        ({"transformer.enc_output_norm.bias": (3,)}, "proposals.project.1.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_name(change, named):
    shapes = {key: shape for key, shape in (deformable_detr() | change).items() if shape is not None}
    with torch.device("meta"), pytest.raises(ValueError, match=re.escape(named)):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        imported(state, source_config(state))


def test_a_one_stage_checkpoint_is_refused():
    state = {key: torch.zeros(shape) for key, shape in deformable_detr().items() if "pos_trans" not in key}
    with pytest.raises(ValueError, match="two-stage"):
        source_config(state)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_checkpoint_that_eval_and_train_read(tmp_path, capsys):
    model = small_transformers_model(num_labels=10, id2label={i: f"digit {i}" for i in range(10)})
    model.save_pretrained(tmp_path / "published")
    assert main(["import", str(tmp_path / "published"), "--out", str(tmp_path / "ours.pt")]) == 0
    trained = load_trained(tmp_path / "ours.pt", torch.device("cpu"))
    assert trained.category_names[3] == "digit 3"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trained.detector(images).logits, model(images).logits, rtol=0, atol=1e-4)

    settings = {**trained.config.to_dict()["detector"], "num_classes": 3, "route": True}
    torch.manual_seed(0)
    detector = Detector(DetectorConfig(**settings))
    before = detector.decoder.heads[0].classify.weight.clone()
    told = taken(detector, tmp_path / "ours.pt", ["digit 7", "new", "digit 0"])
    assert torch.equal(detector.encoder.level_embedding, trained.detector.encoder.level_embedding)
    theirs = trained.detector.decoder.heads[0].classify.weight
    expected = torch.stack([theirs[7], before[1], theirs[0]])
    assert torch.equal(detector.decoder.heads[0].classify.weight, expected)
    assert "2 of 3 classes are known there by name, in the class heads these begin anew: new; " in told
    assert re.search(r"\d+ tensors begin anew: decoder\.routers\.", told)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint of ours with four classes, imported from a model of transformers whose backbone is fine-tuned."""
    folder = tmp_path_factory.mktemp("published")
    names = {0: "cat", 1: "bar", 2: "dog", 3: "square"}
    small_transformers_model(num_labels=4, id2label=names).save_pretrained(folder / "theirs")
    assert main(["import", str(folder / "theirs"), "--out", str(folder / "ours.pt")]) == 0
    return folder / "ours.pt"


def test_training_from_a_checkpoint_takes_its_architecture_and_needs_no_backbone(published, tmp_path, capsys):
    data, run = write_data(tmp_path / "coco", train_images=2, val_images=1), tmp_path / "run"
    sizes = ["transforms.scales=[64]", "transforms.eval_scale=64", "train.batch_size=2", "train.workers=0"]
    words = ["--out", str(run), "--device", "cpu", "--route", "detector.backbone.weights=nobody/nothing"]
    assert main(["train", "--data", str(data), "--init", str(published), *words, *sizes, "train.epochs=1"]) == 0
    told = capsys.readouterr().out
    assert "2 of 2 classes are known there by name; 24 tensors begin anew: decoder.routers.1." in told
    theirs, ours = load_checkpoint(published), load_checkpoint(run / "last.pt")
    expected, found = theirs["config"]["detector"], ours["config"]["detector"]
    differing = {name for name in expected if name not in ("backbone", "memory") and found[name] != expected[name]}
    assert differing == {"num_classes", "route"}
    fixed = "backbone.body.embedder.embedder.normalization.running_mean"
    assert torch.equal(ours["model"][fixed], theirs["model"][fixed])
    moved = ours["model"]["decoder.heads.0.classify.bias"] - theirs["model"]["decoder.heads.0.classify.bias"][[3, 1]]
    assert moved.abs().max() < 1e-3, "a step of AdamW, from the rows of the classes of the same names"
    assert main(["train", "--resume", "--out", str(run), "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "tiny"], r"ours\.pt: \d+ tensors do not fit this detector: .* \[32, 3, 7, 7\] \(there \[8, 3, "),
        (["detector.decoder_layers=2"], r"tensors do not fit .*decoder\.layers\.2\.\S+ \[\S+ \d+\] \(has no place\)"),
        (["detector.masks=true"], r"tensors do not fit .*\w \[[\d, ]+\] \(there is none\)"),
    ],
)
def test_what_does_not_fit_is_an_error_unless_asked_for(published, tmp_path, words, message):
    config = stored_config(load_checkpoint(published), published) if words[0] != "--preset" else preset("tiny")
    changes = {} if words[0] == "--preset" else dict(word.split("=") for word in words)
    detector = Detector(config.updated({**changes, "detector.num_classes": 2}).detector)
    with pytest.raises(CheckpointError, match=message):
        taken(detector, published, ["bar", "other"])
    told = taken(detector, published, ["bar", "other"], partial=True)
    assert "tensors begin anew" in told or "tensors there are not used" in told
    theirs = load_checkpoint(published)["model"]["decoder.layers.0.self_attention.out_proj.weight"]
    assert torch.equal(detector.decoder.layers[0].self_attention.out_proj.weight, theirs)


def test_fixed_layers_never_stay_random(published):
    changes = {"detector.backbone.settings.embedding_size": 16, "detector.num_classes": 2}
    config = stored_config(load_checkpoint(published), published).updated(changes)
    with pytest.raises(CheckpointError, match=r"fine_tune would fix at random; give detector\.backbone\.weights"):
        taken(Detector(config.detector), published, ["bar", "other"], partial=True)


def test_classes_without_names_are_no_names(published):
    detector = load_trained(published, torch.device("cpu")).detector
    state = load_checkpoint(published)
    numbered = published.with_name("numbered.pt")
    save_checkpoint(numbered, {**state, "categories": [{"id": k, "name": str(k)} for k in range(4)]})
    told = taken(detector, numbered, ["3", "2", "1", "0"])
    assert "0 of 4 classes are known there by name" in told


def test_classes_of_one_name_keep_their_rows(published):
    source = load_trained(published, torch.device("cpu")).detector
    twins = published.with_name("twins.pt")
    named = [{"id": k, "name": name} for k, name in enumerate(["car", "bee", "car", "car"])]
    save_checkpoint(twins, {**load_checkpoint(published), "categories": named})
    detector = Detector(source.config)
    told = taken(detector, twins, ["car", "bee", "car", "car"])
    assert torch.equal(detector.decoder.heads[0].classify.weight, source.decoder.heads[0].classify.weight)
    assert "begin anew" not in told
    told = taken(detector, twins, ["ant", "car", "car", "bee"])
    assert torch.equal(
        detector.decoder.heads[0].classify.weight[1:], source.decoder.heads[0].classify.weight[[0, 2, 1]]
    )
    assert "3 of 4 classes are known there by name, in the class heads these begin anew: ant" in told


def test_a_file_of_the_authors_is_read_with_its_arguments_and_prefixes(tmp_path):
    state = {f"module.{key}": torch.zeros(shape) for key, shape in deformable_detr().items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 49}, tmp_path / "checkpoint.pth")
    read, config, _ = read_published(str(tmp_path / "checkpoint.pth"))
    assert read.keys() == deformable_detr().keys() and config.detector.query_content == "joint"


HARMLESS = {
    "number": np.float64(0.5),
    "array": np.arange(3, dtype=">i4"),
    "record": np.zeros(2, dtype=[("a", "f4")]),
    "arguments": argparse.Namespace(lr=np.float32(1e-4), output_dir=Path("a/b"), schedule=defaultdict(list, a=[1])),
    "time": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_is_no_tensor_is_left_out(kind, zipped, tmp_path):
    state = {key: torch.zeros(shape) for key, shape in deformable_detr().items() if "backbone" not in key}
    content = {"model": {**state, "_best": HARMLESS[kind]}, "best": HARMLESS[kind]}
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    assert read_published(str(tmp_path / "checkpoint.pth"))[0].keys() == state.keys()


def test_numbers_of_older_numpy_are_read(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "x": np.float64(2)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            moved = new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(name, moved if name.endswith(".pkl") else new.read(name))
    with pytest.raises(ValueError, match="two-stage Deformable DETR"):  # it has been read
        read_published(str(tmp_path / "old.pth"))


class Left:
    """A type that only its author has."""


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (functools.partial(print), r"functools\.partial"),
        (Left(), r"test_importing\.Left"),
        (os.system, r"(posix|nt)\.system"),
    ],
)
def test_what_could_run_code_is_refused_by_name(content, named, tmp_path, capsys):
    torch.save({"model": {"w": torch.ones(1)}, "x": content}, tmp_path / "odd.pth")
    assert main(["import", str(tmp_path / "odd.pth"), "--out", str(tmp_path / "ours.pt")]) == 2
    message = rf"odd\.pth: expected tensors written by torch\.save: .*[Uu]nsupported .*{named}"
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("content", "named"), [(b"no weights", "torch.save"), (None, "no such file")])
def test_a_file_that_is_no_checkpoint_is_one_error(tmp_path, capsys, content, named):
    if content is not None:
        (tmp_path / "bad.pth").write_bytes(content)
    assert main(["import", str(tmp_path / "bad.pth"), "--out", str(tmp_path / "ours.pt")]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "ours.pt").exists()
