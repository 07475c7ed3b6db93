"""The matcher: as cheap as any assignment, however little of the table is solved; and what of a step waits for the
device."""

import contextlib
import threading
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from small_detector import small_batch, small_detector

import route_kernels as rk
from route_detr.config import TrainConfig
from route_detr.model.criterion import Criterion
from route_detr.model.masks import mask_targets
from route_detr.model.structures import DetectorOutput, Predictions
from route_kernels.nn import BoxTargets, HungarianMatcher, matching, pack_targets

CONFIG = TrainConfig(mask_points=400)


def predictions(batch=2, branches=2, queries=5, classes=3):
    boxes = torch.rand(batch, branches, queries, 4, dtype=torch.float64) * 0.4 + 0.1
    return torch.randn(batch, branches, queries, classes, dtype=torch.float64), boxes


def packed(*counts):
    boxes = torch.rand(sum(counts), 4, dtype=torch.float64) * 0.4 + 0.1
    return BoxTargets(boxes, torch.randint(3, (sum(counts),)), counts)


def costs_of(logits, boxes, targets):
    labels = targets.labels if logits.shape[-1] > 1 else torch.zeros_like(targets.labels)
    return rk.matching_cost(logits, boxes, targets.boxes, labels, targets.counts).split(list(targets.counts))


@pytest.mark.parametrize("table_bytes", [1, 4000, 2**25], ids=["images alone", "some together", "all together"])
@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (7, 2), (1, 30), (0, 4, 0, 0, 2, 1, 0)])
def test_every_row_costs_what_scipy_finds_for_the_whole_table(counts, table_bytes, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(matching, "TABLE_BYTES", table_bytes)
    batch, targets = len(counts), packed(*counts)
    sets = [predictions(batch), predictions(batch, branches=1, queries=4, classes=1), predictions(batch, queries=120)]
    for (logits, boxes), found in zip(sets, HungarianMatcher()(sets, targets), strict=True):
        queries, start = boxes.shape[2], 0
        assert found.target.shape == boxes.shape[:3] and found.counts == [min(queries, count) for count in counts]
        for image, costs in enumerate(costs_of(logits, boxes, targets)):
            first, pairs = targets.first[image], found.counts[image]
            for branch in range(boxes.shape[1]):
                row = found.target[image, branch]
                (query,) = (row >= 0).nonzero(as_tuple=True)
                own = row[query] - first
                assert len(own) == pairs == len(own.unique())
                whole = costs[:, branch].numpy()
                assert whole[own, query].sum() == pytest.approx(whole[linear_sum_assignment(whole)].sum(), abs=1e-9)
                listed = slice(start, start + pairs)
                assert row[found.query[listed]].tolist() == (found.own[listed] + first).tolist()
                start += pairs
        assert start == len(found.own)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    targets=st.integers(0, 9),
    more=st.integers(0, 30),
    kind=st.sampled_from(["random", "ties", "alike", "crowd"]),
    seed=st.integers(0, 2**20),
)
def test_the_cheapest_of_each_target_are_enough(targets, more, kind, seed):
    generator = np.random.default_rng(seed)
    shape = (targets, targets + more)
    costs = {
        "random": lambda: generator.normal(size=shape),
        "ties": lambda: generator.integers(0, 3, shape).astype(float),
        "alike": lambda: np.zeros(shape) + generator.normal(size=(1, shape[1])),
        "crowd": lambda: generator.normal(size=shape) ** 2 * (np.arange(shape[1]) + 1),
    }[kind]()
    cheapest = np.argsort(costs, 1)[:, :targets]
    found = matching.assignment(np.take_along_axis(costs, cheapest, 1), cheapest)
    assert sorted(found[0]) == list(range(targets)) and len(set(found[1])) == targets
    assert costs[found].sum() == pytest.approx(costs[linear_sum_assignment(costs)].sum(), abs=1e-12)


def test_lists_end_with_a_prediction_of_their_own():
    cheapest = np.array([[0, 1, 2], [0, 3, 1], [5, 0, 1]])
    assert matching.list_lengths(cheapest).tolist() == [2, 2, 1]
    assert matching.list_lengths(np.array([[0, 1], [0, 1]])).tolist() == [2, 2]


def test_little_of_a_large_table_is_solved(monkeypatch):
    torch.manual_seed(0)
    solved = []
    monkeypatch.setattr(
        "scipy.optimize.linear_sum_assignment", lambda c: solved.append(c.shape) or linear_sum_assignment(c)
    )
    (logits, boxes), targets = predictions(1, 1, 5000, 1), packed(60)
    HungarianMatcher()([(logits, boxes)], targets)
    ((rows, columns),) = solved
    assert rows == 60 and columns < 500


def test_queries_alike_in_class_and_box_are_told_apart_by_their_masks():
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :16], masks[1, 16:] = True, True
    target = SimpleNamespace(boxes=torch.full((2, 4), 0.5), labels=torch.zeros(2, dtype=torch.int64), masks=masks)
    pixels = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    pixels[:, 0, :4], pixels[:, 1, 4:] = 9.0, 9.0
    embeddings = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64).expand(1, 1, 2, 2)
    alike = Predictions(torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2, 4), 0.5, dtype=torch.float64), embeddings)
    criterion, given = Criterion(CONFIG), pack_targets([target], torch.device("cpu"), torch.float64, 3)
    more = [lambda image: criterion._mask_cost(alike, pixels, mask_targets([target], pixels), image)]
    (found,) = HungarianMatcher()([alike[:2]], given, [["only"]], more)
    assert found.target.tolist() == [[[1, 0]]]


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
    waits = []

    def on_host(tensor):
        assert tensor.device.type == "meta"
        if tensor.is_floating_point():
            return torch.rand(tensor.shape).sort(-1).values
        return torch.arange(tensor.shape[-1]).expand(tensor.shape).contiguous()

    monkeypatch.setattr(HungarianMatcher, "on_host", staticmethod(on_host))
    monkeypatch.setattr(HungarianMatcher, "wait", staticmethod(waits.append))
    output = detector(images.to("meta"), padding_mask.to("meta"), targets)
    losses = Criterion(CONFIG)(output, targets)
    losses["loss"].backward()
    assert waits == [torch.device("meta")] and all(loss.device.type == "meta" for loss in losses.values())
    assert all(parameter.grad is not None for parameter in detector.decoder.layers.parameters())


def test_assignments_of_a_batch_are_solved_by_several_threads(monkeypatch):
    meeting = threading.Barrier(2, timeout=30)

    def met(cost):
        meeting.wait()
        return linear_sum_assignment(cost)

    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", met)
    HungarianMatcher()([predictions(branches=1)], packed(3, 2))
    assert meeting.broken is False


def test_names_of_what_is_not_finite():
    (logits, boxes), targets = predictions(queries=100), packed(3, 4)
    logits[1, 0, 77] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^matching cost of set 0, branch 0, image 1 is .*, prediction 77\)$"):
        HungarianMatcher()([(logits, boxes)], targets)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is dispatched, views aside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (
            function.is_view or function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("denoising", "most"), [(True, 80), (False, 60)])
def test_the_criterion_is_a_handful_of_operators(denoising, most):
    changes = {"denoising_pairs": 8, "query_position": "anchor"} if denoising else {}
    detector = small_detector(dtype=torch.float32, decoder_layers=6, routed_layers="last:2", **changes).train()
    detector.set_routing(0.3, 0.7)
    images, padding_mask, targets = small_batch(dtype=torch.float32)
    output: DetectorOutput = detector(images, padding_mask, targets)
    with Operators() as operators:
        Criterion(CONFIG)(output, targets)
    assert operators.count <= most
