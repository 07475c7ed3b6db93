"""LayerNorm of a residual sum, whose backward starts from the output."""

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import add_layer_norm_arguments, check_accuracy

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

SHAPES = {  # around vectors of 2 to 16 lanes, and parts of 64 tokens
    "one token": dict(batch=1, queries=1, channels=16),
    "one channel": dict(queries=5, channels=1),
    "as many channels as are kept": dict(queries=3, channels=4),
    "7": dict(queries=63, channels=7, zeros=1),
    "odd": dict(batch=3, queries=65, channels=33, zeros=2),
    "256": dict(queries=130, channels=256, zeros=4),
    "1000": dict(batch=1, queries=9, channels=1000),
    "normalized": dict(queries=70, channels=40, zeros=40, keep="normalized"),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_accuracy(sizes, dtype):
    check_accuracy("add_layer_norm", add_layer_norm_arguments(dtype=dtype, **sizes))


@pytest.mark.parametrize("keep", ["output", "normalized"])
def test_gradcheck(keep):
    arguments = add_layer_norm_arguments(queries=3, channels=6, zeros=2, keep=keep, dtype=torch.float64)
    tensors = [arguments[name] for name in ("x", "residual", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda *tensors: rk.add_layer_norm(*tensors, keep=keep), tensors)
