"""The matcher: as cheap as any assignment, with masks in the cost; and what of a step waits for the device."""

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from small_detector import small_batch, small_detector

from route_detr.config import TrainConfig
from route_detr.model import matcher as matching
from route_detr.model.criterion import Criterion
from route_detr.model.masks import mask_targets
from route_detr.model.matcher import Matcher, padded_targets
from route_detr.model.structures import Predictions

CONFIG = TrainConfig(mask_points=400)


def predictions(batch=2, branches=2, queries=5, classes=3, **more):
    boxes = torch.rand(batch, branches, queries, 4, dtype=torch.float64) * 0.4 + 0.1
    return Predictions(torch.randn(batch, branches, queries, classes, dtype=torch.float64), boxes, **more)


def targets(*counts):
    return [SimpleNamespace(boxes=torch.rand(n, 4) * 0.4 + 0.1, labels=torch.randint(3, (n,))) for n in counts]


@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (7, 2)])
def test_every_row_is_the_assignment_that_scipy_finds_alone(counts):
    torch.manual_seed(0)
    matcher, sets = Matcher(CONFIG), [predictions(), predictions(branches=1, queries=4, classes=1)]
    padded = padded_targets(targets(*counts), like=sets[0].boxes)
    for found, each in zip(matcher(sets, padded, [["a", "b"], ["c"]]), sets, strict=True):
        cost = matcher.cost(each, padded).numpy()
        assert found.counts == [min(cost.shape[2], n) for n in counts]
        assert found.image.tolist() == np.repeat([0, 1], found.counts).tolist()
        for branch, image in itertools.product(range(cost.shape[1]), range(2)):
            query, target = linear_sum_assignment(cost[image, branch, :, : counts[image]])
            here = found.image == image
            assert found.query[branch, here].tolist() == query.tolist()
            assert found.target[branch, here].tolist() == target.tolist()


def test_queries_alike_in_class_and_box_are_told_apart_by_their_masks():
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :16], masks[1, 16:] = True, True
    target = SimpleNamespace(boxes=torch.full((2, 4), 0.5), labels=torch.zeros(2, dtype=torch.int64), masks=masks)
    pixels = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    pixels[:, 0, :4], pixels[:, 1, 4:] = 9.0, 9.0
    embeddings = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64).expand(1, 1, 2, 2)
    alike = Predictions(torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2, 4), 0.5, dtype=torch.float64), embeddings)
    padded = padded_targets([target], like=alike.boxes)._replace(masks=mask_targets([target], pixels))
    (found,) = Matcher(CONFIG)([alike], padded, [["only"]], pixels)
    assert found.query.tolist() == [[0, 1]] and found.target.tolist() == [[1, 0]]


STEPS = {
    "plain": {"route": False},
    "routed": {},
    "masks": {"masks": True},
    "denoising": {"denoising_pairs": 8, "query_position": "anchor"},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_the_device_only_to_copy_the_costs(name, monkeypatch):
    """On the meta device whatever needs a value raises: item, nonzero, a mask as an index, a copy to the host."""
    detector = small_detector(dtype=torch.float32, **STEPS[name])
    if detector.config.route:
        detector.set_routing(0.3, 0.7)
    detector.train().to("meta")
    images, padding_mask, targets = small_batch(dtype=torch.float32)
    for target in targets:
        target.masks = torch.ones(len(target.labels), 50, 33, dtype=torch.bool)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *device, **enabled: contextlib.nullcontext())
    copies = []

    def cpu(tensor):
        assert tensor.device.type == "meta"
        copies.append(tensor.shape)
        return torch.rand(tensor.shape)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    output = detector(images.to("meta"), padding_mask.to("meta"), targets)
    losses = Criterion(CONFIG)(output, targets)
    losses["loss"].backward()
    assert len(copies) == 1 and all(loss.device.type == "meta" for loss in losses.values())
    assert all(parameter.grad is not None for parameter in detector.decoder.layers.parameters())


def test_assignments_of_a_batch_are_solved_by_several_threads(monkeypatch):
    import threading

    meeting = threading.Barrier(2, timeout=30)

    def met(cost):
        meeting.wait()
        return linear_sum_assignment(cost)

    monkeypatch.setattr(matching, "linear_sum_assignment", met)
    sets = [predictions(branches=1)]
    Matcher(CONFIG)(sets, padded_targets(targets(3, 2), like=sets[0].boxes), [["a"]])
    assert meeting.broken is False
