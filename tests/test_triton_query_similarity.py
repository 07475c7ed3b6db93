"""query_similarity in Triton, in the interpreter where there is no GPU, against the reference in float64."""

import math

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import check_accuracy, query_similarity_arguments

pytest.importorskip("triton")

runs, reason = rk.can_run("query_similarity", "triton", torch.empty(0))
pytestmark = pytest.mark.skipif(not runs, reason=reason)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {  # around tiles of 16 queries and chunks of 16 channels
    "one query": dict(queries=1, channels=4),
    "one channel": dict(queries=15, channels=1),
    "whole tiles": dict(queries=32, channels=16, batch=1),
    "ragged": dict(queries=37, channels=9),
    "several chunks": dict(queries=18, channels=53, batch=3),
}


def on_triton(x, mode="relu"):
    with rk.backend("triton"):
        return rk.query_similarity(x, mode)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", ["relu", "mean"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_accuracy(sizes, mode, dtype):
    check_accuracy("query_similarity", query_similarity_arguments(mode=mode, dtype=dtype, **sizes), on_triton)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=["batch", "queries", "channels"])
def test_empty_dimensions(shape):
    assert torch.equal(on_triton(torch.randn(shape)), torch.zeros(shape[:2]))


def test_views_are_read_where_they_are():
    x = query_similarity_arguments(queries=19, channels=20)["x"].detach()
    expected = on_triton(x)
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.nn.functional.pad(x, (1, 2))[..., 1:-2]):
        assert not view.is_contiguous()
        assert torch.equal(on_triton(view), expected)
    torch.testing.assert_close(on_triton(x.mT.contiguous().mT), expected)
    assert torch.equal(on_triton(x[:1].expand(3, -1, -1))[2], expected[0])


def test_every_output_is_written_and_nothing_beyond():
    from route_kernels.triton.query_similarity import forward

    x = query_similarity_arguments(batch=2, queries=21, dtype=torch.bfloat16)["x"].detach()
    torch.use_deterministic_algorithms(True)  # fills what `empty` allocates with NaN
    try:
        poisoned = x.new_empty(x.shape[:2])
        forward(x, poisoned)
    finally:
        torch.use_deterministic_algorithms(False)
    assert poisoned.isfinite().all()
    assert torch.equal(poisoned, on_triton(x))


def test_length_matters_only_below_eps():
    x = torch.randn(1, 20, 6)
    expected = on_triton(x)
    for length in (1e-8, 1e15):
        torch.testing.assert_close(on_triton(x * length), expected)
    short = on_triton(torch.nn.functional.normalize(x, dim=-1) * 1e-13)  # x^ = x / 1e-12
    torch.testing.assert_close(short, expected / 100)


def test_zero_queries_have_no_similarity():
    x = torch.randn(1, 20, 4)
    x[0, 2] = 0
    similarity = on_triton(x)
    assert similarity[0, 2] == 0
    torch.testing.assert_close(similarity.double(), rk.reference.query_similarity(x.double(), "relu"))


def test_nan_stays_with_those_who_meet_it():
    x = torch.randn(2, 20, 4)
    x[1, 3] = math.nan
    similarity = on_triton(x)
    assert similarity[0].isfinite().all() and similarity[1].isnan().all()


def test_float64_is_refused_with_the_reason():
    with pytest.raises(rk.BackendUnavailableError, match="the triton kernel takes float16, bfloat16, float32, got"):
        on_triton(torch.randn(1, 4, 3, dtype=torch.float64))
