import json

import pytest

from route_detr.config import PRESETS, Config, DetectorConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_keys_take_defaults():
    assert Config.from_dict({"train": {"epochs": 3}}).detector == DetectorConfig()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"trian": {}}, "trian"),
        ({"train": {"epoch": 3}}, "epoch"),
        ({"detector": {"backbone": {"depth": [1]}}}, "depth"),
    ],
)
def test_unknown_key_is_an_error_that_names_it(values, key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.epochs": "3"}, r"config\.train\.epochs: expected int, got '3'"),
        ({"train.epochs": 0}, "epochs: expected a positive number, got 0"),
        ({"train.drop_at": 0.0}, "drop_at"),
        ({"train.drop_at": float("nan")}, "drop_at"),
        ({"train.learning_rate": float("nan")}, "learning_rate"),
        ({"train.l1_weight": -1.0}, "l1_weight"),
        ({"detector.route": 1}, "route: expected bool"),
        ({"detector.num_heads": 7}, "num_heads: expected a divisor of embed_dim = 256, got 7"),
        ({"detector.num_levels": 2}, "num_levels"),
        ({"detector.branches": "both"}, "branches"),
        ({"detector.query_content": "random"}, "query_content"),
        ({"detector.routed_layers": "last:9"}, "routed_layers"),
        ({"detector.routed_layers": "first:2"}, "routed_layers"),
        ({"detector.routed_layers": [6]}, "routed_layers"),
        ({"detector.routed_layers": []}, "routed_layers"),
        ({"detector.backbone.depths": [1, 1]}, "depths: expected 4 positive numbers"),
        ({"detector.backbone.used_stages": 5}, "used_stages"),
        ({"detector.size": 5}, "unknown key 'detector.size'"),
        ({"train.epochs.more": 5}, "unknown key 'train.epochs.more'"),
    ],
)
def test_bad_value_is_one_error_that_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        Config().updated(change)


def test_updated_replaces_dotted_keys():
    config = Config().updated({"train.epochs": 3, "detector.backbone.depths": [1, 1, 1, 1], "train.l1_weight": 4})
    assert config.train.epochs == 3
    assert config.detector.backbone.depths == (1, 1, 1, 1)
    assert config.train.l1_weight == 4.0


@pytest.mark.parametrize(
    ("routed", "indices"),
    [("last:2", (4, 5)), ("last:6", (0, 1, 2, 3, 4, 5)), ("all", (0, 1, 2, 3, 4, 5)), ((3, 1, 3), (1, 3))],
)
def test_routed_layers(routed, indices):
    assert DetectorConfig(routed_layers=routed).routed_layer_indices == indices
    assert DetectorConfig(routed_layers=routed, route=False).routed_layer_indices == ()


def test_unknown_preset_lists_those_that_exist():
    with pytest.raises(ValueError, match="tiny, deformable-detr-pp-r50"):
        preset("huge")
