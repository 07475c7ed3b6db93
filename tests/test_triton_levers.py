"""add_layer_norm and sigmoid_focal_loss in Triton, in the interpreter where there is no GPU, against float64."""

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import (
    add_layer_norm_arguments,
    call,
    check_accuracy,
    outcome,
    sigmoid_focal_loss_arguments,
)

pytest.importorskip("triton")

runs, reason = rk.can_run("add_layer_norm", "triton", torch.empty(0))
pytestmark = pytest.mark.skipif(not runs, reason=reason)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

NORM_SHAPES = {  # around tiles of 256 elements, and parts of 64 tokens
    "one token": dict(batch=1, queries=1, channels=16),
    "one channel": dict(queries=5, channels=1),
    "as many channels as are kept": dict(queries=3, channels=4, zeros=2),
    "several tokens a tile": dict(queries=7, channels=8, zeros=4),
    "odd, two parts": dict(batch=1, queries=65, channels=17, zeros=2),
    "wider than a tile": dict(batch=1, queries=3, channels=260),
    "normalized": dict(queries=5, channels=10, zeros=10, keep="normalized"),
}
LOSS_SHAPES = {  # around tiles of 128 elements
    "one query": dict(batch=1, queries=1, classes=5),
    "one class": dict(queries=70, classes=1),
    "several queries a tile": dict(queries=9, classes=7, gamma=1.5),
    "several tiles of classes": dict(batch=1, queries=3, classes=150),
    "weighted": dict(queries=3, classes=20, weighted=True, alpha=0.75, reduction="sum"),
    "cross entropy": dict(queries=3, classes=20, gamma=0.0, alpha=0.5),
}


def on_triton(op):
    def run(**arguments):
        with rk.backend("triton"):
            return call(op, arguments)

    return run


@each_dtype
@pytest.mark.parametrize("sizes", NORM_SHAPES.values(), ids=NORM_SHAPES)
def test_accuracy_of_add_layer_norm(sizes, dtype):
    check_accuracy("add_layer_norm", add_layer_norm_arguments(dtype=dtype, **sizes), on_triton("add_layer_norm"))


@each_dtype
@pytest.mark.parametrize("sizes", LOSS_SHAPES.values(), ids=LOSS_SHAPES)
def test_accuracy_of_sigmoid_focal_loss(sizes, dtype):
    arguments = sigmoid_focal_loss_arguments(dtype=dtype, **sizes)
    check_accuracy("sigmoid_focal_loss", arguments, on_triton("sigmoid_focal_loss"))


def test_lost_channels_beyond_the_spare_ones_are_nan_and_not_wrong():
    grad_output = torch.randn(2, 9, 24)
    found = outcome(on_triton("add_layer_norm"), add_layer_norm_arguments(zeros=5), grad_output)
    assert found["output"].isfinite().all() and found["grad x"].isnan().all()
    kept = add_layer_norm_arguments(zeros=5, keep="normalized")
    assert all(result.isfinite().all() for result in outcome(on_triton("add_layer_norm"), kept, grad_output).values())


def test_any_number_that_is_no_class_is_background():
    logits = torch.randn(4, 3, requires_grad=True)
    background, others = torch.full((4,), 3), torch.tensor([3, -1, 100, 2**62])
    with rk.backend("triton"):
        results = [
            torch.autograd.grad(rk.sigmoid_focal_loss(logits, targets), logits)[0] for targets in (background, others)
        ]
    assert torch.equal(*results)


def test_empty_dimensions():
    for shape in ((0, 5), (2, 0, 5), (3, 0)):
        x, weight = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
        y = on_triton("add_layer_norm")(x=x, residual=x, weight=weight, bias=weight)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape
        targets = torch.zeros(shape[:-1], dtype=torch.int64)
        if len(shape) > 1:
            loss = on_triton("sigmoid_focal_loss")(logits=x, targets=targets)
            assert loss == 0 and torch.autograd.grad(loss, x)[0].shape == shape


def test_views_are_read_where_they_are():
    norm, loss = add_layer_norm_arguments(queries=5), sigmoid_focal_loss_arguments(queries=5)
    for op, arguments, name in (("add_layer_norm", norm, "residual"), ("sigmoid_focal_loss", loss, "logits")):
        expected = on_triton(op)(**arguments)
        padded = torch.nn.functional.pad(arguments[name].detach(), (1, 2))[..., 1:-2]
        assert not padded.is_contiguous()
        assert torch.equal(on_triton(op)(**{**arguments, name: padded}), expected)
