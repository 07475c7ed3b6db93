"""Sigmoid focal loss of class indices, with its gradient from the forward pass."""

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import check_accuracy, sigmoid_focal_loss_arguments

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

SHAPES = {  # around vectors of 2 to 16 lanes
    "one query": dict(batch=1, queries=1, classes=5),
    "one class": dict(queries=300, classes=1),
    "7": dict(queries=31, classes=7, gamma=1.5),
    "91": dict(queries=33, classes=91),
    "1203": dict(batch=1, queries=5, classes=1203),
    "weighted": dict(queries=17, classes=20, weighted=True, alpha=0.75),
    "cross entropy": dict(queries=17, classes=20, gamma=0.0, alpha=0.5),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_accuracy(sizes, dtype):
    check_accuracy("sigmoid_focal_loss", sigmoid_focal_loss_arguments(dtype=dtype, **sizes))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_gradcheck(gamma):
    arguments = sigmoid_focal_loss_arguments(queries=5, dtype=torch.float64, weighted=True)
    logits, targets, weight = arguments["logits"], arguments["targets"], arguments["weight"]
    assert torch.autograd.gradcheck(lambda x: rk.sigmoid_focal_loss(x, targets, 0.3, gamma, weight), logits)
