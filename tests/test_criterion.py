import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import route_kernels as rk
from route_detr.config import TrainConfig
from route_detr.model.boxes import inverse_sigmoid
from route_detr.model.criterion import Criterion
from route_detr.model.structures import Denoised, DenoisingTargets, DetectorOutput, Predictions
from route_kernels.boxes import corners, generalized_iou
from route_kernels.nn import HungarianMatcher, pack_targets

CLASSES = 3


def random_boxes(*shape):
    return torch.cat([torch.rand(*shape, 2) * 0.8 + 0.1, torch.rand(*shape, 2) * 0.3 + 0.05], -1).double()


def random_predictions(batch, branches, queries, classes=CLASSES):
    logits = torch.randn(batch, branches, queries, classes, dtype=torch.float64)
    return Predictions(logits.requires_grad_(), random_boxes(batch, branches, queries).requires_grad_())


def random_targets(*counts):
    return [SimpleNamespace(boxes=random_boxes(n), labels=torch.randint(CLASSES, (n,))) for n in counts]


def random_output(batch, queries=6, aux_weight=0.5):
    layers = [random_predictions(batch, 1, queries), random_predictions(batch, 2, queries)]
    proposals = random_predictions(batch, 1, 11, classes=1)
    return DetectorOutput(layers, proposals, torch.tensor(aux_weight, dtype=torch.float64))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - 2 / 9),
        ((0, 0, 4, 4), (1, 1, 2, 2), 1 / 16),
        ((0, 0, 1, 1), (2, 0, 3, 1), -1 / 3),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 1, 1), (3, 3, 4, 4), -14 / 16),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
        ((0, 0, 2, 0), (0, 0, 2, 2), 0.0),
    ],
)
def test_generalized_iou_by_hand(a, b, expected):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert generalized_iou(a, b).item() == pytest.approx(expected, abs=1e-12)
    assert generalized_iou(b, a).item() == pytest.approx(expected, abs=1e-12)


def test_corners():
    assert corners(torch.tensor([5.0, 4.0, 2.0, 6.0])).tolist() == [4, 1, 6, 7]


def test_inverse_sigmoid_is_finite_at_the_ends():
    x = torch.tensor([0.0, 1e-4, 0.5, 0.7, 1.0], dtype=torch.float64)
    assert torch.allclose(inverse_sigmoid(x).sigmoid(), x, atol=1.1e-5)


def pair_cost(logit, box, label, true, config):
    """The matching cost of one query and one target, from the formulas."""
    p = 1 / (1 + math.exp(-logit[label].item()))
    positive = 0.25 * (1 - p) ** 2 * -math.log(p)
    negative = 0.75 * p**2 * -math.log(1 - p)
    l1 = (box - true).abs().sum().item()
    giou = generalized_iou(corners(box), corners(true)).item()
    return 2 * (positive - negative) + 5 * l1 - 2 * giou


def cheapest_by_brute_force(logits, boxes, target, config):
    """The lowest total cost over all injective maps between the queries and the targets of one image."""
    cost = [
        [pair_cost(logits[q], boxes[q], target.labels[t], target.boxes[t], config) for t in range(len(target.labels))]
        for q in range(len(logits))
    ]
    if len(cost[0]) > len(cost):
        cost = list(zip(*cost, strict=True))
    rows, columns = len(cost), len(cost[0])
    return min(sum(cost[q][t] for t, q in enumerate(chosen)) for chosen in itertools.permutations(range(rows), columns))


def packed(targets, like):
    return pack_targets(targets, like.device, like.dtype, CLASSES)


def test_batched_matches_cost_as_little_as_brute_force():
    torch.manual_seed(0)
    config = TrainConfig()
    targets = random_targets(3, 0, 1, 5)
    sets = [random_predictions(4, 3, 4), random_predictions(4, 1, 5)]
    matches = HungarianMatcher()([each[:2] for each in sets], packed(targets, sets[0].boxes))
    for predictions, found in zip(sets, matches, strict=True):
        queries = predictions.boxes.shape[2]
        assert found.counts == [min(queries, len(target.labels)) for target in targets]
        for branch, image in itertools.product(range(predictions.boxes.shape[1]), range(4)):
            target, first = targets[image], sum(len(each.labels) for each in targets[:image])
            (chosen,) = (found.target[image, branch] >= 0).nonzero(as_tuple=True)
            wanted = found.target[image, branch][chosen] - first
            assert len(chosen) == found.counts[image] == len(set(wanted.tolist()))
            if not len(chosen):
                continue
            logits, boxes = predictions.logits[image, branch], predictions.boxes[image, branch]
            total = sum(
                pair_cost(logits[q], boxes[q], target.labels[t], target.boxes[t], config)
                for q, t in zip(chosen, wanted, strict=True)
            )
            assert total == pytest.approx(cheapest_by_brute_force(logits, boxes, target, config), abs=1e-9)


def test_the_criterion_waits_for_the_device_once(monkeypatch):
    waits = []
    monkeypatch.setattr(HungarianMatcher, "wait", staticmethod(waits.append))
    Criterion(TrainConfig())(random_output(2), random_targets(2, 3))
    assert waits == [torch.device("cpu")]


def test_losses_equal_a_plain_loop_over_layers_branches_and_images():
    torch.manual_seed(1)
    config = TrainConfig(class_weight=1.5, l1_weight=3.0, giou_weight=0.5)
    output, targets = random_output(3), random_targets(4, 0, 2)
    losses = Criterion(config)(output, targets)
    rows = {
        "proposals": (output.proposals, 0, 1.0),
        "layer0": (output.layers[0], 0, 1.5),
        "layer1.main": (output.layers[1], 0, 1.0),
        "layer1.aux": (output.layers[1], 1, 0.5),
    }
    for name, (predictions, branch, weight) in rows.items():
        expected = dict.fromkeys(("class", "l1", "giou"), 0.0)
        for image, target in enumerate(targets):
            logits, boxes = predictions.logits[image, branch], predictions.boxes[image, branch]
            labels = torch.zeros_like(target.labels) if name == "proposals" else target.labels
            one = packed([SimpleNamespace(boxes=target.boxes, labels=labels)], boxes)
            (found,) = HungarianMatcher()([(logits[None, None], boxes[None, None])], one)
            query, matched = found.query, found.own
            classes = torch.full((len(logits),), logits.shape[-1])
            classes[query] = labels[matched]
            expected["class"] += 1.5 * rk.sigmoid_focal_loss(logits, classes, 0.25, 2.0).item()
            for q, t in zip(query, matched, strict=True):
                expected["l1"] += 3.0 * (boxes[q] - target.boxes[t]).abs().sum().item()
                expected["giou"] += 0.5 * (1 - generalized_iou(corners(boxes[q]), corners(target.boxes[t])).item())
        for kind, value in expected.items():
            assert losses[f"{name}/{kind}"].item() == pytest.approx(weight * value / 6, rel=1e-12)


def test_denoising_losses_are_those_of_the_targets_that_queries_start_from():
    torch.manual_seed(2)
    config, output, targets = TrainConfig(), random_output(2), random_targets(2, 1)
    layers = [random_predictions(2, 1, 4), random_predictions(2, 2, 4)]
    target, first = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]), torch.tensor([[0], [2]])
    positive = torch.tensor([[True, True, False, False], [True, False, False, False]])
    present = torch.tensor([[True, True, True, True], [True, False, True, False]])
    known = DenoisingTargets(target + first, positive, present, groups=3)
    losses = Criterion(config)(output._replace(denoising=Denoised(layers, known)), targets)
    plain = Criterion(config)(output, targets)
    rows = {"layer0": (layers[0], 0, 1.5), "layer1.main": (layers[1], 0, 1.0), "layer1.aux": (layers[1], 1, 0.5)}
    for name, (predictions, branch, weight) in rows.items():
        expected = dict.fromkeys(("class", "l1", "giou"), 0.0)
        for image, query in itertools.product(range(2), range(4)):
            logits, box = (part[image, branch, query] for part in predictions[:2])
            true = targets[image].boxes[target[image, query]]
            label = targets[image].labels[target[image, query]] if positive[image, query] else torch.tensor(CLASSES)
            if present[image, query]:
                expected["class"] += rk.sigmoid_focal_loss(logits[None], label[None], 0.25, 2.0).item()
            if positive[image, query]:
                expected["l1"] += 5.0 * (box - true).abs().sum().item()
                expected["giou"] += 2.0 * (1 - generalized_iou(corners(box), corners(true)).item())
        for kind, value in expected.items():
            assert losses[f"{name}.denoising/{kind}"].item() == pytest.approx(weight * value / 3 / 3, rel=1e-9)
    assert all(losses[part].item() == pytest.approx(plain[part].item()) for part in plain if part != "loss")
    total = losses.pop("loss").item()
    assert total == pytest.approx(sum(part.item() for part in losses.values()))


def test_predictions_in_bfloat16_are_compared_in_float32():
    torch.manual_seed(3)
    output, targets = random_output(2), random_targets(2, 3)
    low, high = (
        DetectorOutput(
            [Predictions(*(part.to(torch.bfloat16).to(dtype) for part in layer[:2])) for layer in output.layers],
            Predictions(*(part.to(torch.bfloat16).to(dtype) for part in output.proposals[:2])),
            output.aux_weight,
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    with torch.autocast("cpu"):
        losses = Criterion(TrainConfig())(low, targets)
    expected = Criterion(TrainConfig())(high, targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-5
    )


def test_parts_sum_to_the_loss_and_carry_no_gradient():
    losses = Criterion(TrainConfig())(random_output(2), random_targets(2, 3))
    total = losses.pop("loss")
    assert total.requires_grad
    assert sum(part.item() for part in losses.values()) == pytest.approx(total.item(), rel=1e-12)
    assert not any(part.requires_grad for part in losses.values())
    assert len(losses) == 3 * 4


def test_images_without_targets_still_teach_the_classifier():
    output = random_output(2)
    losses = Criterion(TrainConfig())(output, random_targets(0, 0))
    losses["loss"].backward()
    assert losses["layer0/l1"] == 0 and losses["proposals/giou"] == 0
    assert output.layers[0].logits.grad.abs().sum() > 0
    assert all(p.boxes.grad is None or p.boxes.grad.abs().sum() == 0 for p in output.layers)


def test_non_finite_cost_is_an_error_that_names_the_layer():
    output = random_output(2)
    with torch.no_grad():
        output.layers[1].logits[1, 1, 2, :] = torch.nan
    with pytest.raises(FloatingPointError, match=r"layer1\.aux, image 1 is not finite \(target \d, prediction 2\)"):
        Criterion(TrainConfig())(output, random_targets(2, 3))


@pytest.mark.parametrize("bad", [-1, CLASSES])
def test_label_out_of_range_is_a_clear_error(bad):
    targets = random_targets(2, 3)
    targets[1].labels[0] = bad
    with pytest.raises(ValueError, match=rf"^targets\[1\]\.labels\[0\]: expected a number from 0 to 2, got {bad}$"):
        Criterion(TrainConfig())(random_output(2), targets)


def test_wrong_number_of_targets_is_a_clear_error():
    with pytest.raises(ValueError, match="targets: expected one for each of 2 images, got 3"):
        Criterion(TrainConfig())(random_output(2), random_targets(1, 1, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_box_that_is_not_finite_is_a_clear_error(bad):
    targets = random_targets(2, 0, 3)
    targets[2].boxes[1, 3] = bad
    with pytest.raises(ValueError, match=rf"^targets\[2\]\.boxes\[1\]: expected finite numbers, got \[.*, {bad}\]$"):
        Criterion(TrainConfig())(random_output(3), targets)


@pytest.mark.parametrize("name", ["boxes", "labels"])
def test_targets_on_another_device_are_a_clear_error(name):
    target = SimpleNamespace(**{each: SimpleNamespace(device=torch.device("cpu")) for each in ("boxes", "labels")})
    setattr(target, name, SimpleNamespace(device=torch.device("cuda", 1)))
    message = rf"^targets\[0\]\.{name}: expected on the host or on cuda:0, got one on cuda:1$"
    with pytest.raises(ValueError, match=message):
        pack_targets([target], torch.device("cuda", 0), torch.float32, CLASSES)


@pytest.mark.parametrize("counts", [(9, 20), (7, 0)])
def test_more_boxes_than_queries_work(counts):
    output, targets = random_output(2), random_targets(*counts)
    losses = Criterion(TrainConfig())(output, targets)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and output.layers[1].boxes.grad[:, 1].abs().sum() > 0


def test_a_batch_without_images_packs():
    packed_targets = pack_targets([], torch.device("cpu"), torch.float32, CLASSES)
    assert packed_targets.boxes.shape == (0, 4) and packed_targets.labels.dtype == torch.int64
