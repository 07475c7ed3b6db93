"""The CUDA kernels of deformable attention on a GPU: what test_gpu.py does not ask of every backend."""

import gpu_checks
import pytest
import torch
from test_gpu import each_dtype, on_device, pytestmark

import route_kernels as rk
from route_kernels import backends, cuda
from route_kernels.testing import (
    check_accuracy,
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    named_tensors,
    sample_arguments,
)

__all__ = ["pytestmark"]  # the marks of that file are this one's

MAKE = {"ms_deform_attn": ms_deform_attn_arguments, "ms_deform_attn_fused": ms_deform_attn_fused_arguments}
PYRAMID = ((20, 30), (10, 15), (5, 8), (3, 4))
POSITIONS = sum(height * width for height, width in PYRAMID)
ON_16_BYTES, VALUE_BY_VALUE = (8, 16, 24, 32, 40, 64, 72, 128, 200, 256), (1, 7, 33, 264, 300)

each_op = pytest.mark.parametrize("op", cuda.OPS)


@pytest.fixture(autouse=True)
def on_cuda():
    with rk.backend("cuda"):
        yield


def placed(op, dtype=torch.bfloat16, **sizes):
    return on_device(op, MAKE[op](dtype=dtype, **sizes), "cuda")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_op
def test_it_is_taken_where_nothing_is_asked_for(op):
    arguments = placed(op)
    assert backends.resolve(op, None, *(tensor for _, tensor in named_tensors(arguments))) == "cuda"


@each_op
@each_dtype
@pytest.mark.parametrize("channels", [*ON_16_BYTES, *VALUE_BY_VALUE])
def test_rows_of_every_width(op, channels, dtype):
    check_accuracy(op, placed(op, dtype, levels=PYRAMID, batch=2, heads=2, queries=50, channels=channels))


@each_op
@each_dtype
@pytest.mark.parametrize("batch", [1, 5])  # no batch is divided into steps
def test_queries_that_are_positions(op, batch, dtype):
    check_accuracy(op, placed(op, dtype, levels=PYRAMID, batch=batch, heads=8, channels=32, queries=POSITIONS))


@each_op
def test_many_samples_of_one_pixel(op):
    """Every reduction of backward goes to one place."""
    check_accuracy(op, placed(op, torch.float32, levels=((1, 1),), batch=1, heads=2, channels=32, queries=3000))


@each_op
def test_sums_in_order_wait_for_nothing(op, deterministic):
    gpu_checks.check_no_synchronisation(gpu_checks.public(op), placed(op, levels=PYRAMID, queries=300))


@each_op
def test_sums_in_order_in_a_graph(op, deterministic):
    label = next(iter(sample_arguments(op)))
    arguments, *others = (
        on_device(op, sample_arguments(op, torch.bfloat16, queries=70, seed=seed)[label], "cuda") for seed in range(3)
    )
    gpu_checks.check_graph_replay(op, gpu_checks.public(op), arguments, others)


@pytest.mark.parametrize("sizes, what", [
    (dict(levels=((1, 1),) * 33, points=1), "32 levels, got 33"),
    (dict(levels=((1, 1),), points=4097), "4096 points of a query and head, got 4097"),
])  # fmt: skip
def test_more_than_the_kernels_take_is_refused_before_a_launch(sizes, what):
    arguments = placed("ms_deform_attn", torch.float32, batch=1, heads=1, channels=8, queries=1, **sizes)
    with pytest.raises(RuntimeError, match=f"the CUDA kernel takes at most {what}"):
        rk.ms_deform_attn(**arguments)
