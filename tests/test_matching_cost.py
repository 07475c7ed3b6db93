"""Matching costs of predictions and the packed targets of their image."""

import math

import pytest
import torch

import route_kernels as rk
from route_kernels.boxes import corners, generalized_iou
from route_kernels.testing import call, map_tensors, matching_cost_arguments


@pytest.mark.parametrize("backend", [None, "reference", "eager", "triton"])
@pytest.mark.parametrize("class_cost", ["focal", "softmax"])
def test_equation_term_by_term(class_cost, backend):
    given = matching_cost_arguments(batch=3, queries=4, targets=2, dtype=torch.float64, class_cost=class_cost)
    if backend == "triton" and not rk.can_run("matching_cost", "triton", given["logits"])[0]:
        pytest.skip("no triton")
    with rk.backend(backend):
        cost = rk.matching_cost(**given)
    assert cost.shape == (5, 2, 4)
    for t, image in enumerate([0, 0, 1, 2, 2]):
        label, true = given["labels"][t], given["true_boxes"][t]
        for g in range(2):
            for n in range(4):
                logits, box = given["logits"][image, g, n], given["boxes"][image, g, n]
                p = 1 / (1 + math.exp(-logits[label].item()))
                classes = 0.25 * (1 - p) ** 2 * -math.log(p) + 0.75 * p**2 * math.log(1 - p)
                if class_cost == "softmax":
                    classes = -logits.softmax(0)[label].item()
                l1 = sum(abs(a - b) for a, b in zip(box.tolist(), true.tolist(), strict=True))
                giou = generalized_iou(corners(box), corners(true)).item()
                assert cost[t, g, n].item() == pytest.approx(2 * classes + 5 * l1 - 2 * giou, abs=1e-12)


@pytest.mark.parametrize("backend", [None, "reference", "eager", "triton"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "boxes", "true_boxes"])
def test_what_is_not_finite_is_the_cheapest_of_all(where, value, backend):
    given = matching_cost_arguments(queries=20, targets=4)
    if backend == "triton" and not rk.can_run("matching_cost", "triton", given["logits"])[0]:
        pytest.skip("no triton")
    index = {"logits": (0, 1, 17, given["labels"][2]), "boxes": (0, 1, 17, 3), "true_boxes": (2, 0)}[where]
    with rk.backend(backend):
        right = rk.matching_cost(**given)
        given[where][index] = value
        cost = rk.matching_cost(**given)
    marked = torch.zeros_like(cost, dtype=torch.bool)
    touched = {"logits": [t for t in range(4) if given["labels"][t] == given["labels"][2]], "boxes": range(4)}
    for t in touched.get(where, ()):
        marked[t, 1, 17] = True
    if where == "true_boxes":
        marked[2] = True
    assert torch.equal(cost == -math.inf, marked) and torch.equal(cost[~marked], right[~marked])


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_a_label_that_is_no_class_is_marked(label, backend):
    given = matching_cost_arguments(queries=20)
    if backend == "triton" and not rk.can_run("matching_cost", "triton", given["logits"])[0]:
        pytest.skip("no triton")
    given["labels"][1] = label
    with rk.backend(backend):
        cost = rk.matching_cost(**given)
    assert (cost[1] == -math.inf).all() and cost[[0, 2, 3, 4]].isfinite().all()


def test_logits_far_from_0_are_exact():
    given = matching_cost_arguments(batch=1, branches=1, queries=4, classes=1, targets=1, dtype=torch.float64)
    given["logits"].copy_(torch.tensor([-80.0, -30.0, 30.0, 80.0]).view(1, 1, 4, 1))
    (cost,) = rk.matching_cost(**given, class_weight=1.0, l1_weight=0.0, giou_weight=0.0)
    expected = torch.tensor([[0.25 * 80, 0.25 * 30, -0.75 * 30, -0.75 * 80]], dtype=torch.float64)
    torch.testing.assert_close(cost, expected, rtol=1e-11, atol=0)


def test_images_alone_give_the_same_bits():
    given = matching_cost_arguments(batch=4, queries=300, targets=5)
    whole = rk.matching_cost(**given).split(given["counts"])
    for image, each in enumerate(whole):
        first = sum(given["counts"][:image])
        of_image = slice(first, first + given["counts"][image])
        alone = {
            **given,
            **{name: given[name][image : image + 1] for name in ("logits", "boxes", "counts")},
            **{name: given[name][of_image] for name in ("true_boxes", "labels")},
        }
        assert torch.equal(rk.matching_cost(**alone), each)


def test_strided_predictions_need_no_copy():
    given = matching_cost_arguments(queries=30)
    wide = map_tensors(given, lambda x: torch.stack([x, x], -2)[..., 0, :] if x.dim() == 4 else x)
    assert not wide["logits"].is_contiguous()
    assert torch.equal(call("matching_cost", wide), call("matching_cost", given))


def test_nothing_but_the_result_is_allocated():
    given = matching_cost_arguments(batch=1, branches=1, queries=5000, classes=1, targets=50)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        cost = rk.matching_cost(**given)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most < cost.nbytes + 200_000


@pytest.mark.parametrize("kind", [torch.tensor, iter])
def test_counts_are_numbers_that_the_host_has(kind):
    given = matching_cost_arguments()
    with pytest.raises(TypeError, match=r"^matching_cost: counts: expected a sequence of ints, got "):
        rk.matching_cost(**{**given, "counts": kind(given["counts"])})
