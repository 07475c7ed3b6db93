"""Fused deformable attention against its equations and grid_sample, with tolerances measured on PyTorch's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import route_kernels as rk
from route_kernels.testing import (
    EAGER,
    check_accuracy,
    converted,
    map_tensors,
    ms_deform_attn_fused_arguments,
    outcome,
)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LEVELS = ((5, 7), (3, 4), (1, 1))

REFERENCES = {
    "point": dict(coordinates=2),
    "point a level": dict(coordinates=2, reference_levels=3),
    "box": dict(coordinates=4),
    "box a level": dict(coordinates=4, reference_levels=3),
}
SHAPES = {  # channels around vectors of 2 to 16 lanes, points around blocks of 16, queries around batches of 8
    "one of each": dict(levels=((1, 1),), batch=1, heads=1, channels=1, queries=1, points=1),
    "3 channels": dict(channels=3, queries=8, points=1),
    "17 channels": dict(channels=17, queries=5, points=3, batch=1),
    "32 channels, few queries": dict(levels=((20, 21),), channels=32, queries=3, points=4),
    "32 channels, many queries": dict(levels=((6, 5), (3, 3)), channels=32, queries=40, points=8),
    "64 channels": dict(channels=64, queries=9, points=5, heads=1),
    "100 channels": dict(channels=100, queries=10, points=6, batch=1, seed=1),  # seed 0 has a float16 sample on a knot
    "16 levels": dict(levels=((2, 3), (4, 1)) * 8, channels=8, points=1),
    "33 points": dict(levels=((3, 5), (1, 7), (9, 1)), channels=16, points=11),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_references_and_mask(reference, masked, dtype):
    check_accuracy("ms_deform_attn_fused", ms_deform_attn_fused_arguments(dtype=dtype, masked=masked, **reference))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients(sizes, dtype):
    check_accuracy("ms_deform_attn_fused", ms_deform_attn_fused_arguments(dtype=dtype, masked=True, **sizes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("points", [(4, 1, 1), (1, 0, 5), (0, 6, 0), (3, 2, 1)], ids=str)
def test_counts_of_points(points, coordinates, dtype):
    arguments = ms_deform_attn_fused_arguments(dtype=dtype, coordinates=coordinates, reference_levels=3)
    sampled = [level for level, count in zip(LEVELS, points, strict=True) if count]  # grid_sample takes no empty grid
    if len(sampled) == len(LEVELS):
        return check_accuracy("ms_deform_attn_fused", {**arguments, "points": points})
    results = outcome(rk.ms_deform_attn_fused, {**arguments, "points": points}, torch.ones(2, 9, 16))
    with rk.backend("reference"):
        exact = {**converted(arguments, torch.float64), "points": torch.tensor(points)}
        expected = outcome(rk.ms_deform_attn_fused, exact, torch.ones(2, 9, 16))
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name].double(), tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "dtype, point_dtype",
    [("bf16", "f32"), ("f16", "f32"), ("f32", "bf16"), ("f32", "f16"), ("f16", "bf16"), ("f64", "f32"), ("f64", "f16")],
)
def test_points_of_another_dtype(dtype, point_dtype):
    dtype, point_dtype = DTYPES[dtype], DTYPES[point_dtype]
    arguments = ms_deform_attn_fused_arguments(dtype=dtype, point_dtype=point_dtype, coordinates=4)
    results = outcome(rk.ms_deform_attn_fused, arguments, torch.ones(2, 9, 16))
    assert results["output"].dtype == results["grad value"].dtype == dtype
    assert {results[f"grad {name}"].dtype for name in ("reference_points", "sampling_offsets", "attention_logits")} == {
        point_dtype
    }
    if torch.promote_types(dtype, point_dtype) == point_dtype or dtype == torch.float32:
        check_accuracy("ms_deform_attn_fused", arguments)


def test_every_argument_may_have_its_own_dtype():
    arguments = ms_deform_attn_fused_arguments(coordinates=4, dtype=torch.float32)
    own = {"value": torch.float16, "sampling_offsets": torch.bfloat16, "attention_logits": torch.float16}
    arguments |= {name: arguments[name].detach().to(dtype).requires_grad_() for name, dtype in own.items()}
    results = outcome(rk.ms_deform_attn_fused, arguments, torch.ones(2, 9, 16))
    with rk.backend("reference"):
        expected = outcome(rk.ms_deform_attn_fused, arguments, torch.ones(2, 9, 16))
    for name, tensor in expected.items():
        assert results[name].dtype == tensor.dtype
        torch.testing.assert_close(results[name], tensor, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_equals_softmax_locations_and_grid_sample(reference, backend):
    arguments = ms_deform_attn_fused_arguments(dtype=torch.float64, queries=20, masked=True, **reference)
    grad_output = torch.randn(2, 20, 16, dtype=torch.float64)
    expected = outcome(EAGER["ms_deform_attn_fused"], arguments, grad_output)
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn_fused, arguments, grad_output)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_gradcheck(reference):
    arguments = ms_deform_attn_fused_arguments(
        dtype=torch.float64, queries=3, channels=3, batch=1, masked=True, **reference
    )
    names = ("value", "reference_points", "sampling_offsets", "attention_logits")

    def sample(*tensors):
        return rk.ms_deform_attn_fused(**{**arguments, **dict(zip(names, tensors, strict=True)), "points": (1, 2, 3)})

    assert torch.autograd.gradcheck(sample, [arguments[name] for name in names])


# ---- mask, places that are nowhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [2, 60], ids=["few", "many"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_masked_positions_count_as_zero_whatever_they_hold(queries, poison, dtype):
    arguments = ms_deform_attn_fused_arguments(channels=16, queries=queries, masked=True, dtype=dtype)
    mask = arguments["value_mask"]
    assert mask.any() and not mask.all()
    fill = arguments["value"].detach().masked_fill
    zeros = {**arguments, "value": fill(mask[:, :, None, None], 0).requires_grad_(), "value_mask": None}
    poisoned = {**arguments, "value": fill(mask[:, :, None, None], poison).requires_grad_()}
    grad_output = torch.randn(2, queries, 32)
    results, expected = (outcome(rk.ms_deform_attn_fused, given, grad_output) for given in (poisoned, zeros))
    assert (results["grad value"][mask] == 0).all()
    expected["grad value"][mask] = 0
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name


@pytest.mark.parametrize("view", [lambda m: m.t().contiguous().t(), lambda m: F.pad(m, (2, 3))[:, 2:-3],
                                  lambda m: m.repeat_interleave(2, dim=1)[:, ::2]])  # fmt: skip
@pytest.mark.parametrize("queries", [2, 60], ids=["few", "many"])
def test_mask_of_any_strides(view, queries):
    arguments = ms_deform_attn_fused_arguments(channels=16, queries=queries, masked=True)
    viewed = {**arguments, "value_mask": view(arguments["value_mask"])}
    assert not viewed["value_mask"].is_contiguous()
    assert torch.equal(rk.ms_deform_attn_fused(**viewed), rk.ms_deform_attn_fused(**arguments))


def test_everything_masked_gives_zero():
    arguments = ms_deform_attn_fused_arguments(coordinates=4)
    arguments["value_mask"] = torch.ones(2, 48, dtype=torch.bool)
    results = outcome(rk.ms_deform_attn_fused, arguments, torch.ones(2, 9, 16))
    assert all((tensor == 0).all() for tensor in results.values())


LOST = [math.nan, math.inf, -math.inf, 1e30, -3e9]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("argument", ["sampling_offsets", "reference_points"])
@pytest.mark.parametrize("place", LOST, ids=str)
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
def test_a_place_that_is_nowhere_adds_nothing(dtype, coordinates, place, argument, backend):
    arguments = ms_deform_attn_fused_arguments(dtype=dtype, coordinates=coordinates, queries=12)
    lost = torch.zeros(2, 12, 2, 6, dtype=torch.bool)
    with torch.no_grad():
        if argument == "sampling_offsets":
            lost = torch.rand(2, 12, 2, 6) < 0.4
            arguments[argument][lost] = place
        else:
            lost[:, ::3] = True
            arguments[argument][:, ::3, :, 0] = place
    elsewhere = map_tensors(arguments, lambda x: x.detach().clone())
    clear = elsewhere["reference_points"] if argument == "reference_points" else elsewhere["sampling_offsets"]
    clear[~clear.isfinite() | (clear.abs() > 1e6)] = 0.5
    probabilities = arguments["attention_logits"].detach().double().softmax(-1)
    grad_output = torch.randn(2, 12, 16)
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn_fused, arguments, grad_output)
    with rk.backend("reference"):
        # the same sum without the lost samples: they keep their share of the softmax
        doubles = converted(elsewhere, torch.float64)
        one_by_one = [
            rk.ms_deform_attn_fused(**{**doubles, "attention_logits": only(doubles["attention_logits"], k)})
            * probabilities[..., k].repeat_interleave(8, dim=-1)
            * (~lost[..., k]).repeat_interleave(8, dim=-1)
            for k in range(6)
        ]
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(results["output"].double(), sum(one_by_one), rtol=tolerance, atol=tolerance)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert (results["grad sampling_offsets"][lost] == 0).all()
    if argument == "reference_points":
        assert (results["grad reference_points"][:, ::3] == 0).all()


def only(logits, k):
    """All of the softmax's weight on point k."""
    return torch.full_like(logits, -math.inf).index_fill(-1, torch.tensor(k), 0.0)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_softmax_of_large_and_infinite_logits(dtype, backend):
    arguments = ms_deform_attn_fused_arguments(dtype=dtype, points=7)
    with torch.no_grad():
        arguments["attention_logits"][:, :3] *= 1000
        arguments["attention_logits"][:, 3:, :, ::4] = -math.inf
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn_fused, arguments, torch.ones(2, 9, 16))
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert (results["grad attention_logits"][:, 3:, :, ::4] == 0).all()
    with rk.backend("reference"):
        exact = rk.ms_deform_attn_fused(**converted(arguments, torch.float64))
    tolerance = 4 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(results["output"].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_logits_that_are_all_minus_infinity_weigh_nothing(outside, backend):
    able, reason = rk.can_run("ms_deform_attn_fused", backend, torch.empty(0))
    if not able:
        pytest.skip(reason)
    arguments = ms_deform_attn_fused_arguments(queries=3)
    with torch.no_grad():
        arguments["attention_logits"][:, 1] = -math.inf
        arguments["attention_logits"][:, 2, :, 0] = math.nan
        arguments["sampling_offsets"][:, 1:] += 1e4 * outside
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn_fused, arguments, torch.ones(2, 3, 16))
    assert (results["output"][:, 1] == 0).all() and results["output"][:, 0].isfinite().all()
    for name in ("sampling_offsets", "attention_logits", "reference_points"):
        assert (results[f"grad {name}"][:, 1] == 0).all(), name
    assert (results["output"][:, 2] == 0).all() if outside else results["output"][:, 2].isnan().all()
    assert results["grad attention_logits"][:, 2].isnan().all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_a_level_without_pixels_takes_its_share_and_adds_nothing(coordinates, backend):
    arguments = ms_deform_attn_fused_arguments(levels=((4, 3), (0, 5), (2, 2)), coordinates=coordinates)
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn_fused, arguments, torch.ones(2, 9, 16))
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert (results["grad sampling_offsets"][:, :, :, 2:4] == 0).all()
    certain = {**arguments, "attention_logits": only(arguments["attention_logits"].detach(), 2)}
    assert (rk.ms_deform_attn_fused(**certain) == 0).all()


# ---- strides, empty dimensions, autocast -----------------------------------------------------------------------------


def packed_projection(arguments):
    """Offsets and logits as views of one linear layer's output, value of a [B, H, S, D] tensor."""
    offsets, logits = arguments["sampling_offsets"].detach(), arguments["attention_logits"].detach()
    both = torch.cat([offsets.flatten(2), logits.flatten(2)], dim=-1)
    return {
        **arguments,
        "value": arguments["value"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        "sampling_offsets": both[..., : offsets[0, 0].numel()].view(offsets.shape).requires_grad_(),
        "attention_logits": both[..., offsets[0, 0].numel() :].view(logits.shape).requires_grad_(),
        "reference_points": F.pad(arguments["reference_points"].detach(), (1, 2))[..., 1:-2].requires_grad_(),
    }


def reversed_dimensions(arguments):
    def view(tensor):
        dims = tuple(reversed(range(tensor.dim())))
        return tensor.detach().permute(dims).contiguous().permute(dims).requires_grad_(tensor.requires_grad)

    return map_tensors(arguments, view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("queries", [3, 50], ids=["few", "many"])
@pytest.mark.parametrize("view", [packed_projection, reversed_dimensions])
def test_views(view, queries, coordinates, dtype):
    arguments = ms_deform_attn_fused_arguments(
        channels=16, queries=queries, coordinates=coordinates, reference_levels=3, masked=True, dtype=dtype
    )
    viewed = view(arguments)
    assert not viewed["value"].is_contiguous() and not viewed["sampling_offsets"].is_contiguous()
    grad_output = torch.randn(2, queries, 32)
    expected = outcome(rk.ms_deform_attn_fused, arguments, grad_output)
    for name, result in outcome(rk.ms_deform_attn_fused, viewed, grad_output).items():
        assert torch.equal(result, expected[name]), name


def test_references_shared_by_queries_and_images():
    arguments = ms_deform_attn_fused_arguments(dtype=torch.float64)
    leaf = torch.rand(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(
            function(**{**arguments, "reference_points": leaf.expand(2, 9, 3, 2)}).square().sum(), leaf
        )[0]
        for function in (rk.ms_deform_attn_fused, EAGER["ms_deform_attn_fused"])
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "channels", "points", "levels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_empty_dimensions(empty, coordinates, dtype, backend):
    sizes = {empty: () if empty == "levels" else 0}
    arguments = ms_deform_attn_fused_arguments(dtype=dtype, coordinates=coordinates, **sizes)
    with rk.backend(backend):
        output = rk.ms_deform_attn_fused(**arguments)
        results = outcome(rk.ms_deform_attn_fused, arguments, torch.ones_like(output))
    assert all((tensor == 0).all() for tensor in results.values())
    assert results["grad value"].shape == arguments["value"].shape


def test_autocast_lowers_value_and_no_coordinate():
    arguments = ms_deform_attn_fused_arguments()
    by_hand = rk.ms_deform_attn_fused(**{**arguments, "value": arguments["value"].bfloat16()})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rk.ms_deform_attn_fused(**arguments), by_hand)
        with rk.backend("reference"):
            output = rk.ms_deform_attn_fused(**arguments)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, by_hand, rtol=0.01, atol=0.01)


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
    grad_output = torch.randn(2, queries, heads * channels, dtype=torch.float64)
    results = outcome(rk.ms_deform_attn_fused, arguments, grad_output)
    with rk.backend("reference"):
        expected = outcome(rk.ms_deform_attn_fused, arguments, grad_output)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
    shifted = {**arguments, "attention_logits": arguments["attention_logits"] + 3}
    torch.testing.assert_close(rk.ms_deform_attn_fused(**shifted), results["output"], rtol=1e-9, atol=1e-9)


def changed(**changes):
    """The op with one argument replaced by a function of it: a deliberate mistake."""

    def mistaken(**arguments):
        return rk.ms_deform_attn_fused(**{**arguments, **{k: change(arguments[k]) for k, change in changes.items()}})

    return mistaken


MISTAKES = {
    "rows for columns": changed(sampling_offsets=lambda offsets: offsets.flip(-1)),
    "boxes of full size": changed(sampling_offsets=lambda offsets: 2 * offsets),
    "a temperature": changed(attention_logits=lambda logits: 1.05 * logits),
    "mask the other way round": changed(value_mask=torch.logical_not),
    "reference not differentiated": changed(reference_points=lambda r: r.detach() + 0 * r),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake, dtype):
    arguments = ms_deform_attn_fused_arguments(dtype=DTYPES[dtype], queries=30, coordinates=4, masked=True)
    with pytest.raises(AssertionError, match="RMS error"):
        check_accuracy("ms_deform_attn_fused", arguments, MISTAKES[mistake])
