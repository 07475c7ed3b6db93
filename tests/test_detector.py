import dataclasses
from types import SimpleNamespace

import pytest
import torch
from small_detector import SMALL, assert_close, resnet, small_batch, small_detector, trained_step
from torch import nn

import route_kernels as rk
from route_detr.config import BackboneConfig, DetectorConfig, TrainConfig, preset
from route_detr.evaluation import detections
from route_detr.model.backbone import FrozenBatchNorm
from route_detr.model.criterion import Criterion
from route_detr.model.detector import Detector
from route_detr.predict import routing_factors
from route_detr.train import parameter_groups
from route_kernels.boxes import corners, generalized_iou


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_set_routing_rejects_bad_values(bad):
    with pytest.raises(ValueError, match="strength: expected a finite number >= 0"):
        small_detector().set_routing(bad, 0.1)
    with pytest.raises(ValueError, match="aux_weight: expected a finite number >= 0"):
        small_detector().set_routing(0.1, bad)


def test_plain_detector_cannot_be_routed():
    detector = small_detector(route=False)
    detector.set_routing(0.0, 0.0)
    with pytest.raises(ValueError, match="strength: expected 0 in a detector without routing"):
        detector.set_routing(0.3, 0.0)


def test_images_may_be_permuted():
    detector = small_detector().eval()
    images, padding_mask, _ = small_batch(counts=(1, 1, 1))
    order = [2, 0, 1]
    expected, permuted = detector(images, padding_mask), detector(images[order], padding_mask[order])
    assert_close(permuted.boxes, expected.boxes[order], 1e-9)
    assert_close(permuted.logits, expected.logits[order], 1e-9)


def test_loss_does_not_depend_on_the_order_of_targets():
    images, padding_mask, targets = small_batch(counts=(5, 4))
    detector = small_detector()
    _, losses, _ = trained_step(detector, (images, padding_mask, targets), 0.3, 0.6)
    shuffled = [SimpleNamespace(boxes=t.boxes.flip(0), labels=t.labels.flip(0)) for t in targets]
    _, again, _ = trained_step(detector, (images, padding_mask, shuffled), 0.3, 0.6)
    assert_close(again["loss"], losses["loss"])


def test_decoder_is_equivariant_to_the_order_of_queries():
    detector = small_detector(routed_layers="all")
    detector.set_routing(0.3, 0.6)
    images, padding_mask, _ = small_batch()
    memory = detector.encoded(detector.backbone(images), padding_mask)
    _, queries = detector.proposals(memory)
    order, values = torch.randperm(7), detector.routing.read()
    permuted = queries._replace(
        content=queries.content[:, :, order],
        position=queries.position[:, :, order],
        box_logits=queries.box_logits[:, :, order],
        boxes=queries.boxes[:, :, order],
    )
    pairs = zip(detector.decoder(permuted, memory, values), detector.decoder(queries, memory, values), strict=True)
    for shuffled, ordered in pairs:
        assert_close(shuffled.boxes, ordered.boxes[:, :, order], 1e-9)
        assert_close(shuffled.logits, ordered.logits[:, :, order], 1e-9)


def test_no_padding_equals_an_empty_mask_and_each_image_alone():
    detector = small_detector().eval()
    images, empty, _ = small_batch(padded=False)
    together, masked = detector(images), detector(images, empty)
    assert_close(together.boxes, masked.boxes, 1e-9)
    assert_close(detector(images[1:]).boxes, together.boxes[1:], 1e-9)


def test_mask_path_equals_the_path_without_mask():
    """One image without padding beside a padded one takes the masked path; its result stays."""
    detector = small_detector().eval()
    images, padding_mask, _ = small_batch(padded=False)
    padding_mask[1, 40:] = True
    assert_close(detector(images, padding_mask).boxes[:1], detector(images[:1]).boxes, 1e-9)


def test_content_of_the_padding_is_not_seen_beyond_the_convolutions():
    detector = small_detector().eval()
    images, padding_mask, _ = small_batch()
    features = detector.feature_levels(detector.backbone(images))
    memory, embedding = detector.encoder.flattened(features, padding_mask)
    noise = torch.randn_like(memory.features) * memory.padding[..., None]
    outputs = []
    for start in (memory, memory._replace(features=memory.features + noise)):
        encoded = detector.encoder.encoded(start, embedding)
        _, queries = detector.proposals(encoded)
        outputs.append(detector.decoder(queries, encoded)[-1].boxes)
    assert_close(outputs[0], outputs[1], 1e-9)


@pytest.mark.parametrize("size", [(33, 65), (64, 64), (31, 97)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_sizes_and_dtypes(size, dtype):
    detector = small_detector(dtype=dtype)
    batch = small_batch(size=size, dtype=dtype, padded=False)
    output, losses, gradients = trained_step(detector, batch, 0.3, 0.6)
    assert output.boxes.dtype == dtype and losses["loss"].dtype == dtype
    assert output.boxes.shape == (2, 7, 4) and output.logits.shape == (2, 7, 3)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("counts", [(0, 0), (12, 1)])
def test_no_targets_and_more_targets_than_queries(counts):
    _, losses, gradients = trained_step(small_detector(), small_batch(counts=counts), 0.3, 0.6)
    assert losses["loss"].isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())


def test_encoded_content_is_the_feature_of_the_best_proposals():
    detector = small_detector(query_content="encoded").eval()
    images, padding_mask, _ = small_batch()
    memory = detector.encoded(detector.backbone(images), padding_mask)
    proposals, queries = detector.proposals(memory)
    features = detector.proposals.project(memory.features)
    usable_scores = proposals.logits[:, 0, :, 0].masked_fill(memory.padding, -torch.inf)
    best = [int(scores.argmax()) for scores in usable_scores]
    assert not queries.content.requires_grad
    for image, index in enumerate(best):
        assert torch.allclose(queries.content[image, 0, 0], features[image, index])
        assert torch.allclose(queries.boxes[image, 0, 0], proposals.boxes[image, 0, index])


@pytest.mark.parametrize("query_content", ["learned", "encoded"])
def test_fewer_positions_than_queries(query_content):
    detector = small_detector(num_queries=500, query_content=query_content).eval()
    images, _, _ = small_batch(padded=False, size=(40, 40))
    assert detector(images).boxes.shape == (2, 5 * 5 + 3 * 3 + 2 * 2 + 1, 4)


@pytest.mark.parametrize(
    ("images", "padding_mask", "message"),
    [
        (torch.zeros(2, 1, 64, 64), None, "images: expected a floating-point tensor"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), None, "images: expected a floating-point tensor"),
        (torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 32, dtype=torch.bool), r"padding_mask: expected bool \(2, 64"),
        (torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64), "padding_mask: expected bool"),
    ],
)
def test_bad_input_is_a_clear_error(images, padding_mask, message):
    with pytest.raises(ValueError, match=message):
        small_detector(dtype=torch.float32)(images, padding_mask)


def test_routing_factors_of_each_routed_layer():
    detector = small_detector(routed_layers=(0, 2)).train()
    images, padding_mask, _ = small_batch()
    views = routing_factors(detector, images, padding_mask)
    assert detector.training and list(views) == [0, 2]
    bias = rk.routing_bias(views[2].factors)
    assert bias.shape == (2, 7, 7) and 0 < bias.abs().max() <= 5
    assert views[0].confidence.abs().max() == 0 and views[2].confidence.min() > 0
    output = detector.eval()(images, padding_mask)
    assert torch.equal(views[2].boxes, output.layers[1].boxes[:, 0])
    assert routing_factors(small_detector(route=False), images) == {}


def test_detections_are_sorted_pixels_of_the_main_branch():
    output, _, _ = trained_step(small_detector(), small_batch(), 0.3, 0.6)
    found = detections(output, [(100, 200), (50, 10)], top_k=5)
    for image, (one, (height, width)) in enumerate(zip(found, [(100, 200), (50, 10)], strict=True)):
        assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)
        assert one["boxes"].shape == (5, 4) and one["labels"].dtype == torch.int64
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        query, label = divmod(output.logits[image].flatten().argmax().item(), 3)
        box = corners(output.boxes[image, query]).clamp(0, 1) * torch.tensor([width, height, width, height])
        assert one["labels"][0] == label and torch.allclose(one["boxes"][0], box)
    assert len(detections(output, [(1, 1), (1, 1)], top_k=1000)[0]["scores"]) == 21
    output.layers[-1].boxes[1, 0, 3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="image 2 of 2 is not finite"):
        detections(output, [(1, 1), (1, 1)])


def test_parameter_groups_hold_every_trained_parameter_once():
    detector = small_detector()
    groups = parameter_groups(detector, TrainConfig(learning_rate=1.0, sampling_learning_rate_scale=0.2))
    assert {group["name"]: group["lr"] for group in groups} == {"main": 1.0, "backbone": 0.1, "sampling": 0.2}
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(detector.parameters()))
    names = {parameter: name for name, parameter in detector.named_parameters()}
    by_name = {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}
    assert all("sampling_offsets" in name for name in by_name["sampling"])
    assert all(name.startswith("backbone.") for name in by_name["backbone"])
    torch.optim.AdamW(groups)


def test_fine_tuning_fixes_norms_stem_and_first_stage():
    backbone = BackboneConfig(settings=resnet(4, [8, 8]), used_stages=1)
    detector = Detector(DetectorConfig(**{**SMALL, "backbone": backbone})).train()
    assert all(p.requires_grad for p in detector.backbone.parameters())
    fixed = dataclasses.replace(backbone, fine_tune=True)
    detector = Detector(DetectorConfig(**{**SMALL, "backbone": fixed})).train()
    modules = list(detector.backbone.modules())
    assert any(isinstance(module, FrozenBatchNorm) for module in modules)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    trained = {name for name, p in detector.backbone.named_parameters() if p.requires_grad}
    assert trained and all("stages.1" in name for name in trained)
    with pytest.raises(ValueError, match=r"backbone\.weights: expected a model name or folder"):
        parameter_groups(detector, TrainConfig())
    with pytest.raises(ValueError, match="frozen: expected the beginning of a parameter's name in the backbone"):
        Detector(DetectorConfig(**{**SMALL, "backbone": dataclasses.replace(fixed, frozen=("neck.",))}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_frozen_norm_is_batch_norm_with_fixed_statistics_in_the_dtype_of_its_input(dtype):
    norm = nn.BatchNorm2d(5).double().eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    x = torch.randn(2, 5, 3, 4, dtype=dtype)
    normed = FrozenBatchNorm(norm)(x)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), norm(x.double()), atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_backbone_loads_pretrained_weights_from_a_folder(tmp_path):
    backbone = BackboneConfig(settings=resnet(4, [4, 8]), used_stages=2)
    source = Detector(DetectorConfig(**{**SMALL, "backbone": backbone}))
    source.backbone.body.save_pretrained(tmp_path)
    loaded = dataclasses.replace(backbone, settings={}, weights=str(tmp_path))
    detector = Detector(DetectorConfig(**{**SMALL, "backbone": loaded}))
    expected = source.backbone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in detector.backbone.state_dict().items())


def test_tiny_preset_is_tiny():
    detector = Detector(preset("tiny").detector)
    parameters = sum(p.numel() for p in detector.parameters())
    assert 1.5e6 < parameters < 3e6
    assert detector.eval()(torch.zeros(1, 3, 128, 128)).boxes.shape == (1, 60, 4)


def rectangles(size=64):
    """Four images of coloured rectangles; the colour is the class."""
    generator = torch.Generator().manual_seed(3)
    images, targets = torch.zeros(4, 3, size, size), []
    for image in images:
        boxes = []
        for label in range(3):
            extent = torch.randint(12, 28, (2,), generator=generator)
            corner = (torch.rand(2, generator=generator) * (size - extent)).long()
            (x, y), (w, h) = corner.tolist(), extent.tolist()
            image[:, y : y + h, x : x + w] = 0
            image[label, y : y + h, x : x + w] = 2.0
            boxes.append([(x + w / 2) / size, (y + h / 2) / size, w / size, h / size])
        targets.append(SimpleNamespace(boxes=torch.tensor(boxes), labels=torch.arange(3)))
    return images, targets


def test_overfits_four_images():
    torch.manual_seed(0)
    images, targets = rectangles()
    backbone = BackboneConfig(settings=resnet(16, [16, 32, 64]), used_stages=2)
    changes = {"backbone": backbone, "embed_dim": 32, "num_levels": 2, "num_queries": 12, "ffn_dim": 64}
    detector = Detector(DetectorConfig(**{**SMALL, **changes})).train()
    criterion, steps = Criterion(TrainConfig(class_weight=2.0)), 150
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3, weight_decay=1e-4)
    history = []
    for step in range(steps):
        detector.set_routing(0.3 * min(1, step / 100), 0.5)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (steps - step) / 50)
        losses = criterion(detector(images), targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 0.5)
        optimizer.step()
        history.append(losses["loss"].item())
    assert history[-1] < 0.05 * history[0]
    found = detections(detector.eval()(images), [(1, 1)] * 4, top_k=3)
    for one, target in zip(found, targets, strict=True):
        order = one["labels"].argsort()
        assert one["labels"][order].tolist() == [0, 1, 2]
        assert generalized_iou(one["boxes"][order], corners(target.boxes)).min() > 0.8
