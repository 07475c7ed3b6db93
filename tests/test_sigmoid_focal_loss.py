"""Sigmoid focal loss of class indices, with its gradient from the forward pass; the matrix has the rest."""

import math

import pytest
import torch
from matrix import DTYPES, assert_same, each_way, results
from saved_tensors import kept_bytes
from torch import nn

import route_kernels as rk
from route_kernels.testing import EAGER, call, outcome, sigmoid_focal_loss_arguments


def by_hand(logit, is_target, alpha, gamma):
    p = 1 / (1 + math.exp(-logit))
    p_t, alpha_t = (p, alpha) if is_target else (1 - p, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * math.log(p_t)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_equation_term_by_term(backend):
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.0]], dtype=torch.float64)
    expected = [
        sum(by_hand(x, k == target, 0.3, 1.7) for k, x in enumerate(row))
        for row, target in zip(logits.tolist(), (1, 2), strict=True)
    ]
    with rk.backend(backend):
        loss = rk.sigmoid_focal_loss(logits, torch.tensor([1, 2]), 0.3, 1.7, reduction="none")
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_agrees_with_the_criterion_s_formula():
    """route_detr's, on one-hot targets; the gradients to 1e-9 in float64."""
    arguments = sigmoid_focal_loss_arguments(batch=2, queries=300, classes=20, dtype=torch.float64, reduction="sum")
    one_hot = nn.functional.one_hot(arguments["targets"], 21)[..., :20].double()
    ours = outcome(rk.sigmoid_focal_loss, arguments, torch.ones(()))
    logits = arguments["logits"]
    p = logits.sigmoid()
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    p_t = p * one_hot + (1 - p) * (1 - one_hot)
    expected = ((0.25 * one_hot + 0.75 * (1 - one_hot)) * (1 - p_t) ** 2 * cross_entropy).sum()
    (grad,) = torch.autograd.grad(expected, logits)
    assert abs(ours["output"] - expected) <= 1e-9 * expected
    assert (ours["grad logits"] - grad).abs().max() <= 1e-9 * grad.abs().max()


@each_way("sigmoid_focal_loss", ways=("cpu", "reference", "triton"))
def test_any_number_that_is_no_class_is_background(way):
    logits, targets = torch.randn(5, 3, requires_grad=True), torch.tensor([3, -1, 100, -(2**62), 2**62])
    given = {"logits": logits, "reduction": "none"}
    found, expected = (
        results("sigmoid_focal_loss", {**given, "targets": each}, way) for each in (targets, torch.full((5,), 3))
    )
    assert_same(found, expected)


def test_nan_stays_with_its_query():
    arguments = sigmoid_focal_loss_arguments()
    with torch.no_grad():
        arguments["logits"][1, 3, 2] = math.nan
    loss = call("sigmoid_focal_loss", arguments)
    assert loss.isnan().sum() == 1 and loss[1, 3].isnan()


def test_weights_count_queries():
    arguments = sigmoid_focal_loss_arguments(reduction="none")
    rows = call("sigmoid_focal_loss", arguments)
    weight = torch.rand(2, 9)
    given = {**arguments, "weight": weight, "reduction": "sum"}
    torch.testing.assert_close(call("sigmoid_focal_loss", given), (rows * weight).sum())
    (grad,) = torch.autograd.grad(call("sigmoid_focal_loss", given), arguments["logits"])
    (expected,) = torch.autograd.grad((rows * weight).sum(), arguments["logits"])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_gradient_in_the_dtype_of_the_logits_is_all_that_is_kept(dtype):
    arguments = sigmoid_focal_loss_arguments(batch=2, queries=100, classes=20, dtype=dtype)
    but = [arguments["logits"], arguments["targets"]]
    gradient = 2 * 100 * 20 * dtype.itemsize
    assert kept_bytes(lambda: call("sigmoid_focal_loss", arguments), but=but) == gradient
    assert kept_bytes(lambda: EAGER["sigmoid_focal_loss"](**arguments), but=but) >= 5 * gradient
    with torch.no_grad():
        assert kept_bytes(lambda: call("sigmoid_focal_loss", arguments)) == 0


def test_small_gradients_do_not_vanish_in_float16():
    """A query that is surely background has gradients below the smallest float16, until the loss is scaled up."""
    logits = torch.full((1, 8), -7.0, dtype=torch.float16, requires_grad=True)
    loss = rk.sigmoid_focal_loss(logits, torch.tensor([8]))
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(65536.0))
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(rk.sigmoid_focal_loss(exact, torch.tensor([8])) * 65536, exact)
    assert 0 < expected.max() / 65536 < 1e-8
    torch.testing.assert_close(grad.double(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_huge_logits(dtype):
    huge = 6e4 if dtype == torch.float16 else 1e30
    logits = torch.tensor([[huge, -huge], [huge, -huge]], dtype=dtype, requires_grad=True)
    rows = rk.sigmoid_focal_loss(logits, torch.tensor([0, 1]), 0.25, 2.0, reduction="none")
    assert rows[0] == 0
    torch.testing.assert_close(rows[1].double(), logits[0, 0].detach().double())  # 0.75 huge + 0.25 huge
    (grad,) = torch.autograd.grad(rows.sum(), logits)
    assert torch.equal(grad.double(), torch.tensor([[0, 0], [0.75, -0.25]], dtype=torch.float64))
