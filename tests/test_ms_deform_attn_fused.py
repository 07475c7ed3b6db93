"""Fused deformable attention: masks, softmax, places that are nowhere; the matrix has the rest."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import DTYPES, assert_same, check, each_dtype, each_way, results, running, runs

import route_kernels as rk
from route_kernels.testing import (
    EAGER,
    call,
    check_accuracy,
    converted,
    map_tensors,
    ms_deform_attn_fused_arguments,
)  # fmt: skip

OP = "ms_deform_attn_fused"
FEW = dict(levels=((3, 4), (1, 2)), batch=1, queries=5)
WITH_REFERENCE = ("cpu", "reference", "triton", "emulated")
on_triton = pytest.mark.skipif(not runs(OP, "triton"), reason="Triton does not run here")


def test_every_argument_may_have_its_own_dtype():
    arguments = ms_deform_attn_fused_arguments(coordinates=4, dtype=torch.float32)
    own = {"value": torch.float16, "sampling_offsets": torch.bfloat16, "attention_logits": torch.float16}
    arguments |= {name: arguments[name].detach().to(dtype).requires_grad_() for name, dtype in own.items()}
    found, expected = results(OP, arguments, "cpu"), results(OP, arguments, "reference")
    assert_same(found, expected, expected, 0.02)


def test_references_shared_by_queries_and_images():
    arguments, grads = ms_deform_attn_fused_arguments(dtype=torch.float64), []
    leaf = torch.rand(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    for function in (rk.ms_deform_attn_fused, EAGER[OP]):
        output = function(**{**arguments, "reference_points": leaf.expand(2, 9, 3, 2)})
        grads += torch.autograd.grad(output.square().sum(), leaf)
    torch.testing.assert_close(*grads)


def test_the_gradient_of_references_is_computed_where_asked_for_only():
    arguments, seen = ms_deform_attn_fused_arguments(), []
    asked = results(OP, arguments, "cpu")
    arguments["reference_points"] = arguments["reference_points"].detach()
    backward = torch.ops.route_kernels.ms_deform_attn_fused_backward.default

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is backward:
                seen.append(len(result))
            return result

    with Record():
        unasked = results(OP, arguments, "cpu")
    assert seen == [3]
    assert set(asked) - set(unasked) == {"grad reference_points"}
    assert all(torch.equal(tensor, asked[name]) for name, tensor in unasked.items())


# ---- mask, places that are nowhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [2, 60], ids=["few", "many"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@each_way(OP)
def test_masked_positions_count_as_zero_whatever_they_hold(queries, poison, way):
    if queries > 2 and way != "cpu":
        pytest.skip("one way to read value")
    for dtype in (torch.float32, torch.bfloat16):
        arguments = ms_deform_attn_fused_arguments(channels=16, queries=queries, masked=True, dtype=dtype)
        mask, fill = arguments["value_mask"], arguments["value"].detach().masked_fill
        assert mask.any() and not mask.all()
        zeros = {**arguments, "value": fill(mask[:, :, None, None], 0).requires_grad_(), "value_mask": None}
        poisoned = {**arguments, "value": fill(mask[:, :, None, None], poison).requires_grad_()}
        found, expected = (results(OP, given, way) for given in (poisoned, zeros))
        assert (found["grad value"][mask] == 0).all()
        expected["grad value"][mask] = 0
        assert_same(found, expected, () if way == "cpu" else ["grad value"], 1e-5 if dtype == torch.float32 else 0.02)


def test_everything_masked_gives_zero():
    arguments = ms_deform_attn_fused_arguments(coordinates=4)
    arguments["value_mask"] = torch.ones(2, 48, dtype=torch.bool)
    assert all((tensor == 0).all() for tensor in results(OP, arguments, "cpu").values())


def only(logits, k):
    """All of the softmax's weight on point k."""
    return torch.full_like(logits, -math.inf).index_fill(-1, torch.tensor(k), 0.0)


@pytest.mark.parametrize("argument", ["sampling_offsets", "reference_points"])
@pytest.mark.parametrize("place", [math.nan, math.inf, -math.inf, 1e30, -3e9], ids=str)
@pytest.mark.parametrize("coordinates", [2, 4])
@each_way(OP, ways=WITH_REFERENCE)
def test_a_place_that_is_nowhere_adds_nothing(coordinates, place, argument, way):
    queries = 6
    for dtype in (torch.float64, torch.float32, torch.bfloat16) if way in ("cpu", "reference") else (torch.float32,):
        arguments = ms_deform_attn_fused_arguments(dtype=dtype, coordinates=coordinates, queries=queries)
        lost = torch.zeros(2, queries, 2, 6, dtype=torch.bool)
        with torch.no_grad():
            if argument == "sampling_offsets":
                lost = torch.rand(lost.shape) < 0.4
                arguments[argument][lost] = place
            else:
                lost[:, ::3] = True
                arguments[argument][:, ::3, :, 0] = place
        elsewhere = map_tensors(arguments, lambda x: x.detach().clone())
        elsewhere[argument][~elsewhere[argument].isfinite() | (elsewhere[argument].abs() > 1e6)] = 0.5
        probabilities = arguments["attention_logits"].detach().double().softmax(-1)
        found, doubles = results(OP, arguments, way), converted(elsewhere, torch.float64)
        with rk.backend("reference"):  # the same sum without the lost samples: they keep their share of the softmax
            one_by_one = [
                rk.ms_deform_attn_fused(**{**doubles, "attention_logits": only(doubles["attention_logits"], k)})
                * probabilities[..., k].repeat_interleave(8, dim=-1)
                * (~lost[..., k]).repeat_interleave(8, dim=-1)
                for k in range(6)
            ]
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found["output"].double(), sum(one_by_one), rtol=tolerance, atol=tolerance)
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert (found["grad sampling_offsets"][lost] == 0).all()
        if argument == "reference_points":
            assert (found["grad reference_points"][:, ::3] == 0).all()


@each_way(OP, ways=WITH_REFERENCE)
def test_a_level_without_pixels_takes_its_share_and_adds_nothing(way):
    arguments = ms_deform_attn_fused_arguments(levels=((4, 3), (0, 5), (2, 2)))
    assert (results(OP, arguments, way)["grad sampling_offsets"][:, :, :, 2:4] == 0).all()
    certain = {**arguments, "attention_logits": only(arguments["attention_logits"].detach(), 2)}
    assert (results(OP, certain, way)["output"] == 0).all()


# ---- softmax ---------------------------------------------------------------------------------------------------------


@each_dtype
@each_way(OP, ways=WITH_REFERENCE)
def test_softmax_of_large_and_infinite_logits(dtype, way):
    arguments = ms_deform_attn_fused_arguments(dtype=dtype, points=7 if way == "cpu" else 2, queries=6)
    with torch.no_grad():
        arguments["attention_logits"][:, :3] *= 1000
        arguments["attention_logits"][:, 3:, :, ::4] = -math.inf
    found = results(OP, arguments, way)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert (found["grad attention_logits"][:, 3:, :, ::4] == 0).all()
    exact = results(OP, converted(arguments, torch.float64), "reference")["output"]
    tolerance = 4 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(found["output"].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@each_way(OP, ways=WITH_REFERENCE)
def test_logits_that_are_all_minus_infinity_weigh_nothing(outside, way):
    arguments = ms_deform_attn_fused_arguments(queries=3)
    with torch.no_grad():
        arguments["attention_logits"][:, 1] = -math.inf
        arguments["attention_logits"][:, 2, :, 0] = math.nan
        arguments["sampling_offsets"][:, 1:] += 1e4 * outside
    found = results(OP, arguments, way)
    assert (found["output"][:, 1] == 0).all() and found["output"][:, 0].isfinite().all()
    for name in ("sampling_offsets", "attention_logits", "reference_points"):
        assert (found[f"grad {name}"][:, 1] == 0).all(), name
    assert (found["output"][:, 2] == 0).all() if outside else found["output"][:, 2].isnan().all()
    assert found["grad attention_logits"][:, 2].isnan().all()


@on_triton
def test_softmax_of_more_points_than_are_unrolled(monkeypatch):
    from route_kernels.triton.ms_deform_attn import host as settings

    monkeypatch.setattr(settings, "MOST_POINTS_UNROLLED", 3)
    check(OP, ms_deform_attn_fused_arguments(dtype=torch.float64, **FEW), "triton")


@on_triton
def test_softmax_adjoint_of_more_points_than_a_tile_holds():
    from route_kernels.triton.ms_deform_attn_fused import softmax_adjoint, softmax_grid

    logits = torch.randn(1, 3, 2, 131, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 3, 2, 131, dtype=torch.float64)
    (expected,) = torch.autograd.grad(logits.softmax(-1), logits, grad)
    softmax_adjoint[softmax_grid(logits, grad.dtype)](grad, grad, logits.detach())
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


# ---- properties, and the tests themselves ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
    channels=st.integers(1, 40), heads=st.integers(1, 3), queries=st.integers(1, 20),
    points=st.lists(st.integers(0, 6), min_size=4, max_size=4), coordinates=st.sampled_from([2, 4]),
    shared=st.booleans(), masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_properties(levels, channels, heads, queries, points, coordinates, shared, masked, seed):
    counts = points[: len(levels)]
    arguments = ms_deform_attn_fused_arguments(
        levels=tuple(levels), channels=channels, heads=heads, queries=queries, points=max(counts), seed=seed,
        coordinates=coordinates, reference_levels=1 if shared else len(levels), masked=masked, dtype=torch.float64,
    )  # fmt: skip
    for name in ("sampling_offsets", "attention_logits"):
        arguments[name] = arguments[name].detach()[:, :, :, : sum(counts)].requires_grad_()
    arguments["points"] = counts
    found, expected = results(OP, arguments, "cpu"), results(OP, arguments, "reference")
    assert_same(found, expected, expected, 1e-9)
    shifted = {**arguments, "attention_logits": arguments["attention_logits"] + 3}
    torch.testing.assert_close(rk.ms_deform_attn_fused(**shifted), found["output"], rtol=1e-9, atol=1e-9)


def changed(**changes):
    """The op with one argument replaced by a function of it: a deliberate mistake."""

    def mistaken(**arguments):
        return call(OP, {**arguments, **{name: change(arguments[name]) for name, change in changes.items()}})

    return mistaken


MISTAKES = {
    "rows for columns": changed(sampling_offsets=lambda offsets: offsets.flip(-1)),
    "boxes of full size": changed(sampling_offsets=lambda offsets: 2 * offsets),
    "a temperature": changed(attention_logits=lambda logits: 1.05 * logits),
    "mask the other way round": changed(value_mask=torch.logical_not),
    "reference not differentiated": changed(reference_points=lambda r: r.detach() + 0 * r),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@each_way(OP, ways=("cpu", "triton"))
def test_a_mistake_is_caught(mistake, way):
    for dtype in DTYPES.values() if way == "cpu" else (torch.float32,):
        arguments = ms_deform_attn_fused_arguments(
            dtype=dtype, queries=30 if way == "cpu" else 9, coordinates=4, masked=True
        )
        with running(way), pytest.raises(AssertionError, match="RMS error"):
            check_accuracy(OP, arguments, MISTAKES[mistake])
