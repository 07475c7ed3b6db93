import dataclasses
import json
import re
from pathlib import Path

import pytest

from route_detr.config import FIXED, PRESETS, BackboneConfig, Config, DetectorConfig, load_config, preset


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_keys_take_defaults():
    assert Config.from_dict({"train": {"epochs": 3}}).detector == DetectorConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"epoch": 3}}, "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ({"epochs": 3}, "unknown key 'epochs'; did you mean 'train.epochs'?"),
        ({"detector": {"backbone": {"modle": "swin"}}}, "did you mean 'detector.backbone.model'?"),
        ({"transforms": {"flips": 0}}, "did you mean 'transforms.flip'?"),
        ({"detector": {"xyzzy": 1}}, "unknown key 'detector.xyzzy'; keys there: backbone, num_classes, "),
    ],
)
def test_unknown_key_is_an_error_that_names_the_nearest(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.epochs": "three"}, r"train\.epochs: Input should be a valid integer.*, got 'three'"),
        ({"train.epochs": 0}, "train.epochs: Input should be greater than 0, got 0"),
        ({"train.drop_at": 0.0}, "drop_at"),
        ({"train.drop_at": float("nan")}, "drop_at"),
        ({"train.learning_rate": float("nan")}, "learning_rate"),
        ({"train.l1_weight": -1.0}, "l1_weight"),
        ({"detector.route": "perhaps"}, "detector.route: Input should be a valid boolean"),
        ({"detector.num_heads": 7}, "detector.num_heads: expected a divisor of embed_dim = 256, got 7"),
        ({"detector.embed_dim": 30}, "embed_dim: Input should be a multiple of 4"),
        ({"detector.num_levels": 2}, "detector.num_levels: expected at least used_stages = 3, got 2"),
        ({"detector.branches": "both"}, "detector.branches: Input should be 'packed' or 'two_pass', got 'both'"),
        ({"detector.query_content": "random"}, "query_content"),
        ({"detector.routed_layers": "last:9"}, "routed_layers"),
        ({"detector.routed_layers": "first:2"}, "routed_layers"),
        ({"detector.routed_layers": [6]}, "routed_layers: expected 'all', 'last:1' to 'last:6' or layer numbers"),
        ({"detector.routed_layers": []}, "routed_layers"),
        ({"detector.denoising_pairs": 10}, "detector.query_position: expected 'anchor' or 'scaled_anchor'"),
        ({"schedule.layer_strengths": [1, 2, 3]}, "schedule.layer_strengths: expected none or 2 numbers, got 3"),
        ({"transforms.flip": 2}, "transforms.flip: Input should be less than or equal to 1, got"),
        ({"detector.size": 5}, "unknown key 'detector.size'"),
        ({"train.epochs.more": 5}, "unknown key 'train.epochs.more'"),
        ({"detector": 3}, "detector: Input should be a dictionary"),
    ],
)
def test_bad_value_is_one_error_that_names_the_field(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Config().updated(change)
    assert "\n" not in str(caught.value)


def test_updated_replaces_dotted_keys():
    changes = {"train.epochs": "3", "detector.backbone.settings.depths": [1, 1], "train.learning_rate": "1e-3"}
    config = Config().updated({**changes, "transforms.scales": [64, 96], "detector.route": "false"})
    assert config.train.epochs == 3 and config.train.learning_rate == 1e-3
    assert config.detector.backbone.settings == {"depths": [1, 1]}
    assert config.transforms.scales == (64, 96) and config.detector.route is False
    assert Config().detector.backbone.settings == {}


@pytest.mark.parametrize(
    ("routed", "indices"),
    [
        ("last:2", (4, 5)),
        ("last:6", (0, 1, 2, 3, 4, 5)),
        ("all", (0, 1, 2, 3, 4, 5)),
        ((3, 1, 3), (1, 3)),
        ("3,4", (3, 4)),
        (5, (5,)),
    ],
)
def test_routed_layers(routed, indices):
    assert DetectorConfig(routed_layers=routed).routed_layer_indices == indices
    assert DetectorConfig(routed_layers=routed, route=False).routed_layer_indices == ()


def test_unknown_preset_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"preset: expected one of .*dino-r50.*tiny, .*, got 'huge'"):
        preset("huge")


def test_a_preset_changes_its_base_and_a_file_may_change_a_preset(tmp_path):
    small, dino = preset("tiny"), preset("tiny-dino")
    assert dino.train == small.train and dino.detector.backbone == small.detector.backbone
    assert dino.detector.denoising_pairs > 0 == small.detector.denoising_pairs
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny-dino\ntrain: {epochs: 7}\n")
    assert load_config(file) == dino.updated({"train.epochs": 7})
    file.write_text("")
    assert load_config(file) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 7}", r"mine\.yaml: unknown key 'train.epoch'; did you mean 'train.epochs'"),
        ("base: huge", r"mine\.yaml: preset: expected one of "),
        ("train: [", r"mine\.yaml: "),
        ("- 1", r"mine\.yaml: expected sections"),
        ("train: 3", r"mine\.yaml: train: Input should be a dictionary"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "mine.yaml")


def test_the_papers_recipes():
    assert preset("deformable-detr-pp-r50").detector == dataclasses.replace(
        DetectorConfig(), backbone=BackboneConfig(fine_tune=True)
    )
    assert preset("dino-r50").detector.num_queries == 900
    assert preset("dino-swin-l").detector.backbone.model == "swin"
    assert preset("dino-swin-l").train == preset("dino-r50").train
    assert [preset(f"deformable-detr-pp-r50-{epochs}e").train.epochs for epochs in (24, 36)] == [24, 36]


def test_every_option_has_a_page():
    pages = [file.read_text(encoding="utf-8") for file in Path(__file__).parents[1].joinpath("docs").glob("*.md")]
    named = set(re.findall(r"\w+", " ".join(pages)))
    assert {name for section in vars(Config()).values() for name in vars(section)} <= named
    assert {field.name for field in dataclasses.fields(BackboneConfig)} <= named


@pytest.mark.parametrize(("section", "name"), [(section, name) for section, fixed in FIXED.items() for name in fixed])
def test_a_field_of_an_earlier_version_may_have_the_value_that_is_fixed_now(section, name):
    assert Config.from_dict({section: {name: FIXED[section][name]}}) == Config()
    assert Config().updated({f"{section}.{name}": str(FIXED[section][name])}) == Config()
    with pytest.raises(
        ValueError, match=rf"{section}\.{name}: expected {FIXED[section][name]}, which is fixed now, got 3"
    ):
        Config.from_dict({section: {name: 3}})
