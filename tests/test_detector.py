from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import route_kernels as rk
from route_detr.boxes import corners, generalized_iou
from route_detr.config import BackboneConfig, DetectorConfig, TrainConfig, preset
from route_detr.criterion import Criterion
from route_detr.detector import Detector, detections, parameter_groups
from route_kernels.nn import MSDeformAttn, QueryRouter, RoutedSelfAttention

SMALL = {
    "backbone": BackboneConfig(block="basic", stem_channels=4, channels=(4, 8, 8, 12), depths=(1, 1, 1, 1)),
    "num_classes": 3,
    "embed_dim": 16,
    "num_heads": 2,
    "num_points": 2,
    "num_levels": 4,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_queries": 7,
    "ffn_dim": 16,
    "router_hidden_dim": 8,
    "router_rank": 4,
    "router_gate_rank": 5,
}


def small_detector(seed=0, dtype=torch.float64, **changes):
    """A small detector whose zero-initialised layers are perturbed, so that every gradient path is alive."""
    torch.manual_seed(seed)
    detector = Detector(DetectorConfig(**{**SMALL, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return detector


def small_batch(seed=0, size=(70, 45), counts=(3, 0), dtype=torch.float64, padded=True):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), 3, *size, generator=generator, dtype=dtype)
    padding_mask = torch.zeros(len(counts), *size, dtype=torch.bool)
    if padded:
        padding_mask[0, 50:], padding_mask[1, :, 33:] = True, True
        images = images.masked_fill(padding_mask[:, None], 0)
    targets = [
        SimpleNamespace(
            boxes=torch.rand(count, 4, generator=generator) * 0.3 + 0.2,
            labels=torch.randint(3, (count,), generator=generator),
        )
        for count in counts
    ]
    return images, padding_mask, targets


def trained_step(detector, batch, strength, aux_weight):
    """Losses and gradients of one training step; the running statistics of the norms are left as they were."""
    images, padding_mask, targets = batch
    if detector.config.route:
        detector.set_routing(strength, aux_weight)
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    detector.zero_grad()
    output = detector(images, padding_mask)
    losses = Criterion(TrainConfig())(output, targets)
    losses["loss"].backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in detector.named_parameters()
    }
    return output, losses, gradients


def assert_close(actual, expected, relative=1e-9):
    assert (actual - expected).abs().max() <= relative * expected.abs().max().clamp_min(1e-6)


def layer_losses(losses):
    """{(layer, kind): loss over both branches}."""
    merged = Counter()
    for name, part in losses.items():
        if name != "loss":
            row, kind = name.split("/")
            merged[row.partition(".")[0], kind] += part.item()
    return merged


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.7])
@pytest.mark.parametrize("routed", ["last:1", "last:2", "all", (1,), (0, 2)])
def test_packed_branches_equal_two_passes(routed, strength):
    detectors = [small_detector(routed_layers=routed, branches=form) for form in ("packed", "two_pass")]
    (packed, losses, gradients), (naive, expected_losses, expected) = (
        trained_step(detector, small_batch(), strength, 0.6) for detector in detectors
    )
    fork = detectors[0].config.routed_layer_indices[0] if strength else 3
    assert [layer.boxes.shape[1] for layer in packed.layers] == [1] * fork + [2] * (3 - fork)
    assert [layer.boxes.shape[1] for layer in naive.layers] == [2, 2, 2]
    for ours, theirs in zip(packed.layers, naive.layers, strict=True):
        assert_close(ours.boxes.expand_as(theirs.boxes), theirs.boxes)
        assert_close(ours.logits.expand_as(theirs.logits), theirs.logits)
    assert_close(losses["loss"], expected_losses["loss"])
    assert layer_losses(losses) == pytest.approx(layer_losses(expected_losses), rel=1e-9, abs=1e-12)
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert_close(gradients[name], expected[name])


def test_every_trained_parameter_gets_a_gradient():
    _, _, gradients = trained_step(small_detector(routed_layers="all"), small_batch(), 0.3, 0.6)
    without = {name for name, gradient in gradients.items() if gradient.abs().sum() == 0}
    assert without == set()


def test_branches_differ_after_the_fork_only():
    output, _, _ = trained_step(small_detector(routed_layers=(1,)), small_batch(), 1.0, 0.6)
    main, aux = output.layers[1].boxes.unbind(1)
    assert (main - aux).abs().max() > 1e-6


@pytest.mark.parametrize("branches", ["packed", "two_pass"])
def test_warm_up_is_the_plain_detector_counted_one_plus_alpha_times(branches):
    batch = small_batch()
    routed = small_detector(branches=branches)
    plain = small_detector(route=False)
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".routers." not in k})
    _, losses, gradients = trained_step(routed, batch, 0.0, 0.4)
    _, plain_losses, _ = trained_step(plain, batch, 0.0, 0.0)
    for (layer, kind), value in layer_losses(plain_losses).items():
        factor = 1 if layer == "proposals" else 1.4
        assert layer_losses(losses)[layer, kind] == pytest.approx(factor * value, rel=1e-6)
    assert all(gradients[name].abs().sum() == 0 for name in gradients if ".routers." in name)


def test_warm_up_runs_each_decoder_layer_once():
    detector = small_detector()
    calls = []
    for layer in detector.decoder.layers:
        layer.self_attention.register_forward_hook(lambda *_: calls.append(1))
    trained_step(detector, small_batch(), 0.0, 0.4)
    assert len(calls) == 3


def test_two_routed_layers_of_three_fork_late():
    """One pass of layer 0; for layers 1 and 2 one cross-attention over one value, one more self-attention."""
    detector = small_detector(routed_layers="last:2")
    calls = Counter()
    for name, module in detector.decoder.named_modules():
        if isinstance(module, RoutedSelfAttention | MSDeformAttn):
            module.register_forward_hook(lambda module, *_, name=name: calls.update([name]))
    trained_step(detector, small_batch(), 0.3, 0.4)
    assert [calls[f"layers.{i}.self_attention"] for i in range(3)] == [1, 2, 2]
    assert [calls[f"layers.{i}.cross_attention"] for i in range(3)] == [1, 1, 1]


def test_eval_costs_nothing(monkeypatch):
    routed = small_detector(routed_layers="all").eval()
    routed.set_routing(0.3, 0.7)
    plain = small_detector(route=False, seed=1).eval()
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".routers." not in k})
    routings = []

    def forbidden(*_, **__):
        raise AssertionError("a router ran in eval mode")

    original = RoutedSelfAttention.forward
    monkeypatch.setattr(QueryRouter, "forward", forbidden)
    monkeypatch.setattr(
        RoutedSelfAttention, "forward", lambda self, q, p, r=None: routings.append(r) or original(self, q, p, r)
    )
    monkeypatch.setattr(rk, "query_similarity", forbidden)
    images, padding_mask, _ = small_batch()
    with torch.no_grad():
        ours, theirs = routed(images, padding_mask), plain(images, padding_mask)
    assert routings == [None] * 6
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.logits, theirs.logits)
    assert ours.aux_weight == 0 and all(layer.boxes.shape[1] == 1 for layer in ours.layers)


def test_plain_detector_has_no_router():
    detector = small_detector(route=False)
    assert not any(isinstance(module, QueryRouter) for module in detector.modules())
    output, losses, _ = trained_step(detector, small_batch(), 0.0, 0.0)
    assert output.aux_weight == 0
    assert "layer2/class" in losses


def test_strength_and_alpha_survive_reload(tmp_path):
    first = small_detector()
    first.set_routing(0.25, 0.625)
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    second = small_detector(seed=1)
    second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert second.routing.strength == 0.25 and second.routing.aux_weight == 0.625
    batch = small_batch()
    (_, losses, _), (_, expected, _) = (
        trained_step(detector, batch, detector.routing.strength.item(), detector.routing.aux_weight.item())
        for detector in (second, first)
    )
    assert losses["loss"] == expected["loss"]
    assert second.train()(*batch[:2]).layers[-1].boxes.shape[1] == 2


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
    memory = detector._memory(images, padding_mask)
    _, queries = detector.proposals(memory)
    order = torch.randperm(7)
    permuted = queries._replace(
        content=queries.content[:, :, order],
        position=queries.position[:, :, order],
        box_logits=queries.box_logits[:, :, order],
    )
    pairs = zip(detector.decoder(permuted, memory, 0.3), detector.decoder(queries, memory, 0.3), strict=True)
    for shuffled, ordered in pairs:
        assert_close(shuffled.boxes, ordered.boxes[:, :, order], 1e-9)
        assert_close(shuffled.logits, ordered.logits[:, :, order], 1e-9)


def test_no_padding_equals_an_empty_mask_and_each_image_alone():
    detector = small_detector().eval()
    images, empty, _ = small_batch(padded=False)
    together, masked = detector(images), detector(images, empty)
    assert torch.equal(together.boxes, masked.boxes)
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
    from route_detr.encoder import flatten_levels

    memory, embedding = flatten_levels(features, padding_mask)
    noise = torch.randn_like(memory.features) * memory.padding[..., None]
    outputs = []
    for start in (memory, memory._replace(features=memory.features + noise)):
        encoded = detector.encoder(start, embedding)
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


def test_fewer_positions_than_queries():
    detector = small_detector(num_queries=500).eval()
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
    views = detector.routing_factors(images, padding_mask)
    assert detector.training and list(views) == [0, 2]
    bias = rk.routing_bias(views[2].factors)
    assert bias.shape == (2, 7, 7) and 0 < bias.abs().max() <= 5
    assert views[0].confidence.abs().max() == 0 and views[2].confidence.min() > 0
    output = detector.eval()(images, padding_mask)
    assert torch.equal(views[2].boxes, output.layers[1].boxes[:, 0])
    assert small_detector(route=False).routing_factors(images) == {}


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
    backbone = BackboneConfig(block="bottleneck", stem_channels=4, channels=(8, 8), depths=(1, 1), used_stages=1)
    detector = Detector(DetectorConfig(**{**SMALL, "backbone": backbone})).train()
    assert all(p.requires_grad for p in detector.backbone.parameters())
    fixed = BackboneConfig(**{**vars(backbone), "fine_tune": True})
    detector = Detector(DetectorConfig(**{**SMALL, "backbone": fixed})).train()
    norms = [m for m in detector.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    trained = {name for name, p in detector.backbone.named_parameters() if p.requires_grad}
    assert trained and all("stages.1" in name for name in trained)


def test_backbone_loads_pretrained_weights_from_a_folder(tmp_path):
    backbone = BackboneConfig(block="basic", stem_channels=4, channels=(4, 8), depths=(1, 1), used_stages=2)
    source = Detector(DetectorConfig(**{**SMALL, "backbone": backbone}))
    source.backbone.body.save_pretrained(tmp_path)
    loaded = BackboneConfig(**{**vars(backbone), "weights": str(tmp_path)})
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
    backbone = BackboneConfig(block="basic", stem_channels=16, channels=(16, 32, 64), depths=(1, 1, 1), used_stages=2)
    changes = {"backbone": backbone, "embed_dim": 32, "num_levels": 2, "num_queries": 12, "ffn_dim": 64}
    detector = Detector(DetectorConfig(**{**SMALL, **changes})).train()
    criterion = Criterion(TrainConfig())
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3, weight_decay=1e-4)
    history = []
    for step in range(300):
        detector.set_routing(0.3 * min(1, step / 100), 0.5)
        losses = criterion(detector(images), targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 0.5)
        optimizer.step()
        history.append(losses["loss"].item())
    assert history[-1] < 0.1 * history[0]
    found = detections(detector.eval()(images), [(1, 1)] * 4, top_k=3)
    for one, target in zip(found, targets, strict=True):
        order = one["labels"].argsort()
        assert one["labels"][order].tolist() == [0, 1, 2]
        assert generalized_iou(one["boxes"][order], corners(target.boxes)).min() > 0.7
