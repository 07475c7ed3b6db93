import dataclasses

import pytest
import torch
from small_detector import SMALL, VARIANTS, assert_close, resnet, small_batch, small_detector, trained_step
from torch import nn
from transformers import ResNetConfig, ResNetModel

from route_detr.config import PRESETS, BackboneConfig, DetectorConfig, preset
from route_detr.data.batches import collate
from route_detr.data.coco import coco_layout, open_splits
from route_detr.model.backbone import Backbone
from route_detr.model.criterion import Criterion
from route_detr.model.detector import Detector
from route_detr.predict import stored_config
from route_detr.tools.digits import write_digits
from route_detr.train import parameter_groups
from route_kernels.nn import pack_targets

CONTENTS = {content: {"query_content": content} for content in ("encoded", "box", "joint")}
ALL = {**VARIANTS, **CONTENTS}


@pytest.mark.parametrize("variant", ALL)
def test_packed_branches_equal_two_passes(variant):
    detectors = [small_detector(**ALL[variant], branches=form) for form in ("packed", "two_pass")]
    (packed, losses, gradients), (naive, expected_losses, expected) = (
        trained_step(detector, small_batch(), 0.3, 0.6) for detector in detectors
    )
    for ours, theirs in zip(packed.layers, naive.layers, strict=True):
        assert_close(ours.boxes.expand_as(theirs.boxes), theirs.boxes)
    assert_close(losses["loss"], expected_losses["loss"])
    for name in expected:
        assert_close(gradients[name], expected[name])


@pytest.mark.parametrize("route", [False, True])
@pytest.mark.parametrize("variant", ALL)
def test_every_parameter_gets_a_gradient(variant, route):
    detector = small_detector(**ALL[variant], route=route)
    _, losses, gradients = trained_step(detector, small_batch(), 0.3 * route, 0.6 * route)
    assert losses["loss"].isfinite()
    assert [name for name, gradient in gradients.items() if not gradient.abs().sum() > 0] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_brings_everything_back(variant, tmp_path):
    first, second = (small_detector(seed, **VARIANTS[variant]).eval() for seed in (0, 1))
    first.set_routing(0.2, 0.5, "delegator")
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    images, padding_mask, _ = small_batch()
    assert torch.equal(first(images, padding_mask).boxes, second(images, padding_mask).boxes)
    (strengths, *others), (expected, *expected_others) = second.routing.read(), first.routing.read()
    assert strengths.equal(expected) and others == expected_others and others[-1] == "delegator"


def test_look_forward_twice_gives_a_layer_the_next_ones_box_loss():
    for twice in (False, True):
        detector = small_detector(look_forward_twice=twice, route=False)
        output = detector(*small_batch())
        heads = [head.refine[-1].weight for head in detector.decoder.heads]
        gradients = torch.autograd.grad(output.layers[1].boxes.sum(), heads, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [twice, True, False]


def test_scaled_anchors_use_the_content_after_the_first_layer():
    decoder = small_detector(**VARIANTS["tiny-dab"]).decoder
    scales = []
    decoder.anchor_scale.register_forward_hook(lambda *call: scales.append(call[1][0].shape))
    anchors = []
    decoder.anchor.register_forward_hook(lambda *call: anchors.append(call[1][0]))
    detector = small_detector(**VARIANTS["tiny-dab"], route=False)
    detector.decoder.anchor, detector.decoder.anchor_scale = decoder.anchor, decoder.anchor_scale
    detector.eval()(small_batch()[0])
    assert len(anchors) == 3 and len(scales) == 2
    assert not torch.equal(anchors[0], anchors[1])


def test_swin_feeds_the_detector_and_loads_from_a_folder(tmp_path):
    settings = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
    swin = BackboneConfig(model="swin", settings=settings)
    detector = small_detector(backbone=swin)
    output, losses, _ = trained_step(detector, small_batch(), 0.3, 0.6)
    assert losses["loss"].isfinite() and output.boxes.shape == (2, 7, 4)
    detector.backbone.body.save_pretrained(tmp_path)
    loaded = Detector(DetectorConfig(**{**SMALL, "backbone": dataclasses.replace(swin, weights=str(tmp_path))}))
    expected = detector.backbone.state_dict()
    assert all(torch.equal(value, expected[name].float()) for name, value in loaded.backbone.state_dict().items())
    with pytest.raises(ValueError, match=r"weights: expected all of resnet's parameters in .*, got none of \['encoder"):
        small_detector(backbone=BackboneConfig(settings={"depths": [9, 9, 9, 9]}, weights=str(_saved_resnet(tmp_path))))


def _saved_resnet(folder):
    body = small_detector().backbone.body
    body.save_pretrained(folder / "resnet")
    return folder / "resnet"


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"model": "rosnet"}, "backbone: expected a model of transformers with an AutoBackbone"),
        ({"model": "bert"}, "backbone: expected a model of transformers with an AutoBackbone"),
        ({"model": "swim"}, "AutoBackbone: unknown key 'swim'; did you mean 'swin'"),
        (
            {"settings": {"embeding_size": 8}},
            "unknown key 'detector.backbone.settings.embeding_size'; did you mean "
            "'detector.backbone.settings.embedding_size'",
        ),
        ({"model": "swin", "settings": {"depth": [2]}}, "did you mean 'detector.backbone.settings.depths'"),
        ({"settings": {"out_features": ["stage1"]}}, "unknown key 'detector.backbone.settings.out_features'"),
        ({"settings": {"depths": "many"}}, "detector.backbone.settings: Validation error for field 'depths'"),
        ({"settings": {"hidden_sizes": [8]}}, "detector.backbone.settings: no resnet can be built of"),
        ({"weights": "no/such/folder/here"}, "detector.backbone.weights: no/such/folder/here: "),
        ({"settings": resnet(4, [4, 8])}, "used_stages: expected at most 2 for resnet, got 3"),
    ],
)
def test_a_backbone_that_cannot_be_is_a_clear_error(backbone, message):
    with pytest.raises(ValueError, match=message):
        small_detector(backbone=BackboneConfig(**backbone))


def test_a_backbone_of_given_weights_can_be_built_without_them(tmp_path):
    """Its checkpoint needs that: the settings are those of the weights, not those of the preset."""
    config = ResNetConfig(**resnet(4, [4, 8, 8]), hidden_act="gelu", id2label={0: "x"})
    ResNetModel(config).save_pretrained(tmp_path)
    given = BackboneConfig(weights=str(tmp_path), used_stages=2)
    alone = dataclasses.replace(given.self_contained(), weights=None)
    assert alone.settings == {**resnet(4, [4, 8, 8]), "hidden_act": "gelu"}
    shapes = [{n: p.shape for n, p in Backbone(each, 2).state_dict().items()} for each in (given, alone)]
    assert shapes[0] == shapes[1]
    assert alone.self_contained() is alone


def test_a_setting_that_never_was_is_left_out_of_an_old_checkpoint(tmp_path):
    config = preset("tiny").updated({"detector.backbone.settings.path_norm": True})
    with pytest.raises(ValueError, match="path_norm"):
        Detector(config.detector)
    assert stored_config({"config": config.to_dict()}, tmp_path) == preset("tiny")


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("tiny")])
def test_full_size_presets_can_be_built(name):
    with torch.device("meta"):
        detector = Detector(preset(name).detector)
    parameters = sum(p.numel() for p in detector.parameters())
    assert (1.9e8 if "swin" in name else 3.9e7) < parameters < (2.3e8 if "swin" in name else 5e7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_under_autocast(variant):
    detector = small_detector(**VARIANTS[variant], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, losses, gradients = trained_step(detector, small_batch(dtype=torch.float32), 0.3, 0.6)
    assert losses["loss"].dtype == torch.float32 and losses["loss"].isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_transformer_compiles_without_a_graph_break(variant, backend):
    detector = small_detector(**VARIANTS[variant], decoder_layers=2, routed_layers="last:1", dtype=torch.float32)
    if detector.denoising:
        detector.denoising.label_noise = detector.denoising.box_noise = 0.0
    detector.set_routing(0.3, 0.6)
    images, padding_mask, targets = small_batch(dtype=torch.float32)
    features = [feature.detach() for feature in detector.backbone(images)]
    padded = pack_targets(targets, images.device, images.dtype, 91) if detector.denoising else None
    weights = list(detector.decoder.parameters())

    def outputs(transformer):
        boxes = transformer(features, padding_mask, padded).boxes
        return boxes, *torch.autograd.grad(boxes.square().sum(), weights, allow_unused=True, materialize_grads=True)

    compiled = torch.compile(detector.transformer, backend=backend, fullgraph=True)
    for ours, expected in zip(outputs(compiled), outputs(detector.transformer), strict=True):
        assert_close(ours, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("route", [False, True])
@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny")])
def test_two_hundred_steps_on_crowded_digits_let_the_loss_fall(name, route, tmp_path_factory):
    config = preset(name).updated({"detector.route": route})
    folder = tmp_path_factory.getbasetemp() / "digits"
    write_digits(folder, train_images=400, val_images=1, progress=False)
    dataset, _ = open_splits(coco_layout(folder), config.transforms, masks=config.detector.masks)
    torch.manual_seed(0)
    detector = Detector(config.detector).train()
    criterion = Criterion(config.train)
    optimizer = torch.optim.AdamW(parameter_groups(detector, config.train))
    history = []
    for step in range(200):
        batch = collate([dataset[(8 * step + row) % 400] for row in range(8)])
        if route:
            detector.set_routing(min(0.3, step / 300), 0.5)
        output = detector(batch.images, batch.padding_mask, batch.targets)
        parts = criterion(output, batch.targets)
        optimizer.zero_grad()
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(detector.parameters(), config.train.clip_norm)
        optimizer.step()
        history.append(sum(value.item() for part, value in parts.items() if part.startswith("layer2")))
    assert sum(history[-20:]) < 0.8 * sum(history[:20])
