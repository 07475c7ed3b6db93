"""Mean cosine similarity of each query to the others: equations, lengths and NaN; the matrix has the rest."""

import math

import pytest
import torch
from matrix import each_way, running

import route_kernels as rk

OP = "query_similarity"
each_mode = pytest.mark.parametrize("mode", ["relu", "mean"])
each_backend = each_way(OP, ways=("cpu", "reference", "triton"))


@each_backend
def test_equations_pair_by_pair(way):
    x = torch.randn(1, 4, 3, dtype=torch.float32 if way == "triton" else torch.float64)
    rows = x[0].tolist()

    def cosine(i, j):
        dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return dot / (math.hypot(*rows[i]) * math.hypot(*rows[j]))

    relu = [sum(max(cosine(i, j), 0) for j in range(4) if j != i) / 4 for i in range(4)]
    mean = [sum(cosine(i, j) for j in range(4) if j != i) / 3 for i in range(4)]
    with running(way):
        for mode, expected in (("relu", relu), ("mean", mean)):
            torch.testing.assert_close(rk.query_similarity(x, mode), torch.tensor([expected], dtype=x.dtype))


@each_mode
@each_backend
def test_one_query_and_zero_queries_are_like_no_other(mode, way):
    with running(way):
        assert (rk.query_similarity(torch.randn(3, 1, 5), mode) == 0).all()
        x = torch.randn(1, 20, 4)
        x[0, 2] = 0
        similarity = rk.query_similarity(x, mode)
    assert similarity[0, 2] == 0
    torch.testing.assert_close(similarity.double(), rk.reference.query_similarity(x.double(), mode))


@each_mode
@each_backend
def test_length_matters_only_below_eps(mode, way):
    x = torch.randn(1, 20, 6)
    with running(way):
        expected = rk.query_similarity(x, mode)
        for length in (1e-8, 1e15):
            torch.testing.assert_close(rk.query_similarity(x * length, mode), expected)
        short = rk.query_similarity(torch.nn.functional.normalize(x, dim=-1) * 1e-13, mode)  # x^ = x / 1e-12
    torch.testing.assert_close(short, expected / 100)


@each_backend
def test_nan_stays_with_those_who_meet_it(way):
    x = torch.randn(2, 20, 4)
    x[1, 3] = math.nan
    with running(way):
        similarity = rk.query_similarity(x)
    assert similarity[0].isfinite().all() and similarity[1].isnan().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_relu_has_no_gradient_and_mean_has_two(backend):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    with rk.backend(backend):
        assert not rk.query_similarity(x).requires_grad
        assert torch.autograd.gradgradcheck(lambda x: rk.query_similarity(x, "mean"), x)


@pytest.mark.skipif(not rk.can_run(OP, "triton", torch.empty(0))[0], reason="Triton does not run here")
def test_triton_refuses_float64_with_the_reason():
    with (
        rk.backend("triton"),
        pytest.raises(rk.BackendUnavailableError, match="the triton kernel takes float16, bfloat16, float32, got"),
    ):
        rk.query_similarity(torch.randn(1, 4, 3, dtype=torch.float64))
