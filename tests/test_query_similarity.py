"""Mean cosine similarity of each query to the others."""

import math

import pytest
import torch

import route_kernels as rk
from route_kernels import native
from route_kernels.testing import check_accuracy, query_similarity_arguments

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

SHAPES = {  # around tiles of 32 to 256 queries, and around vectors of 2 to 16 lanes
    "one query": dict(queries=1, channels=4),
    "two queries": dict(queries=2, channels=1),
    "31": dict(queries=31, channels=7, batch=1),
    "33": dict(queries=33, channels=16, batch=3),
    "65": dict(queries=65, channels=8),
    "129": dict(queries=129, channels=31),
    "255": dict(queries=255, channels=3),
    "257": dict(queries=257, channels=33, batch=1),
    "600": dict(queries=600, channels=256, batch=1),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", ["relu", "mean"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_accuracy(sizes, mode, dtype):
    check_accuracy("query_similarity", query_similarity_arguments(mode=mode, dtype=dtype, **sizes))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_equations_pair_by_pair(backend):
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    rows = x[0].tolist()

    def cosine(i, j):
        dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return dot / (math.hypot(*rows[i]) * math.hypot(*rows[j]))

    relu = [sum(max(cosine(i, j), 0) for j in range(4) if j != i) / 4 for i in range(4)]
    mean = [sum(cosine(i, j) for j in range(4) if j != i) / 3 for i in range(4)]
    with rk.backend(backend):
        for mode, expected in (("relu", relu), ("mean", mean)):
            torch.testing.assert_close(rk.query_similarity(x, mode), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["relu", "mean"])
def test_one_query_is_like_no_other(mode):
    assert (rk.query_similarity(torch.randn(3, 1, 5), mode) == 0).all()


@pytest.mark.parametrize("mode", ["relu", "mean"])
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=["batch", "queries", "channels"])
def test_empty_dimensions(shape, mode):
    assert torch.equal(rk.query_similarity(torch.randn(shape), mode), torch.zeros(shape[:2]))


@pytest.mark.parametrize("mode", ["relu", "mean"])
def test_zero_queries_have_no_similarity(mode):
    x = torch.randn(1, 5, 4)
    x[0, 2] = 0
    similarity = rk.query_similarity(x, mode)
    assert similarity[0, 2] == 0 and similarity.isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mode", ["relu", "mean"])
def test_length_matters_only_below_eps(mode, backend):
    x = torch.randn(1, 40, 6)
    with rk.backend(backend):
        expected = rk.query_similarity(x, mode)
        for length in (1e-8, 1e15):
            torch.testing.assert_close(rk.query_similarity(x * length, mode), expected)
        short = rk.query_similarity(torch.nn.functional.normalize(x, dim=-1) * 1e-13, mode)  # x^ = x / 1e-12
        torch.testing.assert_close(short, expected / 100)


@pytest.mark.parametrize("mode", ["relu", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_views(mode, dtype):
    x = query_similarity_arguments(queries=37, channels=9, dtype=dtype)["x"].detach()
    expected = rk.query_similarity(x, mode)
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.nn.functional.pad(x, (1, 2))[..., 1:-2]):
        assert not view.is_contiguous()
        assert torch.equal(rk.query_similarity(view, mode), expected)
    torch.testing.assert_close(rk.query_similarity(x.mT.contiguous().mT, mode), expected)
    torch.testing.assert_close(rk.query_similarity(x[:1].expand(3, -1, -1), mode)[2], expected[0])


def test_relu_has_no_gradient_and_mean_has():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    for backend in (None, "reference"):
        with rk.backend(backend):
            assert not rk.query_similarity(x).requires_grad
            assert torch.autograd.gradcheck(lambda x: rk.query_similarity(x, "mean"), x)
            assert torch.autograd.gradgradcheck(lambda x: rk.query_similarity(x, "mean"), x)


def test_nan_stays_with_those_who_meet_it():
    x = torch.randn(2, 40, 4)
    x[1, 3] = math.nan
    similarity = rk.query_similarity(x)
    assert similarity[0].isfinite().all() and similarity[1].isnan().all()


@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_poisoned_output_threads_and_repeats(dtype, threads):
    x = query_similarity_arguments(batch=2, queries=100, dtype=dtype)["x"].detach()
    alone = rk.query_similarity(x)
    torch.set_num_threads(threads)
    output = torch.full_like(alone, math.nan)
    torch.ops.route_kernels_native.query_similarity_forward(x, output)
    assert torch.equal(output, alone)  # each query is one worker's: the same sums for any number of threads
    assert torch.equal(rk.query_similarity(x), output)


@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
def test_nothing_of_queries_squared_is_allocated():
    x = torch.randn(1, 4096, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rk.query_similarity(x)
    allocations = [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::")]
    assert x.nbytes < max(allocations) < 4096 * 4096 / 4
