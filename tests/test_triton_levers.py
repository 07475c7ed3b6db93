"""add_layer_norm and sigmoid_focal_loss in Triton, in the interpreter where there is no GPU, against float64."""

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import (
    add_layer_norm_arguments,
    call,
    check_accuracy,
    sigmoid_focal_loss_arguments,
)

pytest.importorskip("triton")

runs, reason = rk.can_run("add_layer_norm", "triton", torch.empty(0))
pytestmark = pytest.mark.skipif(not runs, reason=reason)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

NORM_SHAPES = {  # around tiles of 64 elements, and parts of 64 tokens
    "one token": dict(batch=1, queries=1, channels=16),
    "one channel": dict(queries=5, channels=1),
    "as many channels as are kept": dict(queries=3, channels=4, zeros=2),
    "several tokens a tile": dict(queries=7, channels=8, zeros=4),
    "odd, two parts": dict(batch=1, queries=65, channels=17, zeros=2),
    "wider than a tile": dict(batch=1, queries=3, channels=130),
    "normalized": dict(queries=5, channels=10, zeros=10, keep="normalized"),
}
LOSS_SHAPES = {  # around tiles of 32 elements
    "one query": dict(batch=1, queries=1, classes=5),
    "one class": dict(queries=21, classes=1),
    "several queries a tile": dict(queries=9, classes=7, gamma=1.5),
    "several tiles of classes": dict(batch=1, queries=3, classes=71),
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
