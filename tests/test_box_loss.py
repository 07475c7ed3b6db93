"""L1 and GIoU loss of predicted boxes and the true boxes that they are matched with."""

import math

import pytest
import torch
from saved_tensors import kept_bytes

import route_kernels as rk
from route_kernels.boxes import corners, generalized_iou
from route_kernels.testing import box_loss_arguments, outcome


def test_equation_box_by_box():
    given = box_loss_arguments(dtype=torch.float64)
    losses = rk.box_loss(**given, l1_weight=3.0, giou_weight=0.5)
    for box, target, (l1, giou) in zip(
        given["boxes"].flatten(0, 1), given["target"].flatten(), losses.flatten(0, 1), strict=True
    ):
        if target < 0:
            assert l1 == giou == 0
            continue
        true = given["true_boxes"][target]
        assert l1.item() == pytest.approx(3.0 * (box - true).abs().sum().item())
        assert giou.item() == pytest.approx(0.5 * (1 - generalized_iou(corners(box), corners(true)).item()))


CORNERS = {  # predicted, true: (cx, cy, w, h), exact in binary
    "the same": ((0.5, 0.5, 0.25, 0.25), (0.5, 0.5, 0.25, 0.25)),
    "one side each": ((0.5, 0.5, 0.25, 0.5), (0.5, 0.5, 0.25, 0.25)),
    "inside": ((0.5, 0.5, 0.125, 0.125), (0.5, 0.5, 0.5, 0.5)),
    "around": ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.125, 0.125)),
    "touching": ((0.25, 0.5, 0.25, 0.25), (0.5, 0.5, 0.25, 0.25)),
    "apart": ((0.125, 0.125, 0.125, 0.125), (0.75, 0.75, 0.25, 0.25)),
    "no area": ((0.25, 0.25, 0.0, 0.0), (0.5, 0.5, 0.25, 0.25)),
    "no area either": ((0.25, 0.25, 0.0, 0.0), (0.25, 0.25, 0.0, 0.0)),
    "sides crossed": ((0.5, 0.5, -0.25, 0.25), (0.5, 0.5, 0.25, 0.25)),
    "a line": ((0.5, 0.5, 0.25, 0.0), (0.5, 0.5, 0.25, 0.25)),
}


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("pair", CORNERS.values(), ids=CORNERS)
def test_corners_have_the_gradient_of_plain_pytorch(pair, backend):
    boxes, true = (torch.tensor([box], dtype=torch.float64) for box in pair)
    if backend == "triton" and not rk.can_run("box_loss", "triton", boxes)[0]:
        pytest.skip("no triton")
    given = {"boxes": boxes.requires_grad_(), "true_boxes": true, "target": torch.zeros(1, dtype=torch.int64)}
    for grad in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])):
        with rk.backend("reference"):
            expected = outcome(rk.box_loss, given, grad)
        with rk.backend(backend):
            found = outcome(rk.box_loss, given, grad)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_any_number_that_is_no_target_is_none(backend):
    boxes = torch.rand(5, 4, requires_grad=True)
    if backend == "triton" and not rk.can_run("box_loss", "triton", boxes)[0]:
        pytest.skip("no triton")
    with rk.backend(backend):
        losses = rk.box_loss(boxes, torch.rand(3, 4), torch.tensor([-1, 3, 100, -(2**62), 2**62]))
    losses.sum().backward()
    assert not losses.any() and not boxes.grad.any()


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_a_nan_stays_one(backend):
    boxes = torch.full((2, 4), 0.5)
    if backend == "triton" and not rk.can_run("box_loss", "triton", boxes)[0]:
        pytest.skip("no triton")
    boxes[0, 2] = math.nan
    with rk.backend(backend):
        losses = rk.box_loss(boxes, torch.full((1, 4), 0.4), torch.tensor([0, 0]))
    assert losses[0].isnan().all() and losses[1].isfinite().all()


def test_backward_keeps_what_it_is_given():
    given = box_loss_arguments(batch=2, queries=500)
    of_arguments = sum(given[name].nbytes for name in ("boxes", "true_boxes", "target"))
    assert kept_bytes(lambda: rk.box_loss(**given)) <= of_arguments
