"""Deformable attention: where samples fall, levels in every form, memory; the matrix has the rest."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import assert_same, check, each_dtype, each_way, results, running, runs
from saved_tensors import kept_tensors
from torch.nn import functional as F

import route_kernels as rk
from route_kernels.testing import (
    call,
    check_accuracy,
    converted,
    declaration,
    map_tensors,
    ms_deform_attn_arguments,
    named_tensors,
)  # fmt: skip

OP = "ms_deform_attn"
BOTH = (OP, "ms_deform_attn_fused")
LEVELS = ((5, 7), (3, 4), (1, 1))
FEW = dict(levels=((3, 4), (1, 2)), batch=1, queries=5)
WITH_REFERENCE = ("cpu", "reference", "triton", "triton in order", "emulated", "emulated in order")
on_triton = pytest.mark.skipif(not runs(OP, "triton"), reason="Triton does not run here")


# ---- where samples fall ----------------------------------------------------------------------------------------------


def by_hand(level, x, y):
    """One bilinear sample of level [h, w, D] at the pixel (x, y), in Python's numbers."""
    height, width, channels = level.shape
    total = [0.0] * channels
    row, column = math.floor(y), math.floor(x)
    for r, weight_y in ((row, 1 - (y - row)), (row + 1, y - row)):
        for c, weight_x in ((column, 1 - (x - column)), (column + 1, x - column)):
            if 0 <= r < height and 0 <= c < width:
                total = [t + weight_y * weight_x * v for t, v in zip(total, level[r, c].tolist(), strict=True)]
    return total


@each_dtype
@pytest.mark.parametrize("size", [(4, 8), (1, 1), (1, 8), (2, 1)], ids=str)
def test_every_knot_edge_and_half_pixel(size, dtype):
    height, width = size  # powers of two, and values of few bits: every step is exact, in every dtype
    xs, ys = (torch.arange(-1.5, length + 1, 0.25, dtype=torch.float64) for length in (width, height))
    pixels = torch.cartesian_prod(xs, ys)
    locations = ((pixels + 0.5) / torch.tensor([width, height])).view(1, -1, 1, 1, 1, 2)
    value = torch.randint(-4, 5, (1, height * width, 1, 3)).to(dtype)
    weights = torch.ones(locations.shape[:-1], dtype=dtype)
    output = rk.ms_deform_attn(value, (size,), None, locations.to(torch.float32), weights)
    level = value.view(height, width, 3).double()
    expected = torch.tensor([by_hand(level, x, y) for x, y in pixels.tolist()], dtype=torch.float64)
    assert torch.equal(output[0].double(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@each_way(OP, ways=("cpu", "triton"))
def test_gradients_on_knots_edges_and_half_pixels_are_the_references(way, dtype):
    step = 1 if way == "cpu" else 0.25
    height, width = (4, 8) if way == "cpu" else (2, 4)
    pixels = torch.cartesian_prod(torch.arange(-2.0, width + 2, step), torch.arange(-2.0, height + 2, step)).to(dtype)
    locations = ((pixels + 0.5) / torch.tensor([width, height])).to(dtype).view(1, -1, 1, 1, 1, 2)
    arguments = {
        "value": torch.randint(-4, 5, (1, height * width, 1, 4)).to(dtype).requires_grad_(),
        "spatial_shapes": ((height, width),),
        "level_start_index": None,
        "sampling_locations": locations.requires_grad_(),
        "attention_weights": torch.randint(1, 4, locations.shape[:-1]).to(dtype).requires_grad_(),
    }
    grad_output = torch.randint(-3, 4, (1, len(pixels), 4)).to(dtype)
    assert_same(results(OP, arguments, way, grad_output), results(OP, arguments, "reference", grad_output))


NOWHERE = {
    "NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf, "1e30": 1e30, "-1e30": -1e30,
    "beyond int32": 3e9, "beyond int64": 2e19, "a pixel outside": 1.5, "a pixel before": -0.5,
}  # fmt: skip


@pytest.mark.parametrize("place", NOWHERE)
@each_way(OP, ways=WITH_REFERENCE)
def test_a_sample_that_is_nowhere_adds_nothing(way, place):
    many = way in ("cpu", "reference")
    axes = [0, 1, slice(None)]
    for axis in axes if many else [axes[list(NOWHERE).index(place) % 3]]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16) if many else (torch.float32,):
            arguments = ms_deform_attn_arguments(levels=((2, 2), (5, 3)), queries=5, dtype=dtype)
            lost = torch.rand(2, 5, 2, 2, 2) < 0.4
            with torch.no_grad():
                arguments["sampling_locations"][..., axis][lost] = NOWHERE[place]
            without = map_tensors(arguments, lambda x: x.detach().clone())
            without["attention_weights"][lost] = 0
            without["sampling_locations"][lost] = 0.5
            without = map_tensors(without, lambda x: x.requires_grad_())
            found, expected = results(OP, arguments, way), results(OP, without, way)
            for name in ("output", "grad value"):
                torch.testing.assert_close(found[name], expected[name])
            assert not found["grad sampling_locations"][lost].any() and not found["grad attention_weights"][lost].any()
            kept = found["grad sampling_locations"][~lost], expected["grad sampling_locations"][~lost]
            torch.testing.assert_close(*kept)


@pytest.mark.parametrize("queries", [2, 60], ids=["few", "many"])
@each_way(OP, ways=("cpu", "triton", "emulated"))
def test_poison_that_no_sample_touches_stays_where_it_is(way, queries):
    if queries > 2 and way != "cpu":
        pytest.skip("one way to read value")
    arguments = ms_deform_attn_arguments(levels=((9, 9), (3, 3)), channels=16, queries=queries, points=4)
    with torch.no_grad():
        arguments["sampling_locations"].clamp_(0.4, 0.6)
        arguments["sampling_locations"][:, 0, :, :, 0] = math.nan  # reads nothing, not even the first row
    level = torch.ones(9, 9, dtype=torch.bool)
    level[2:7, 2:7] = False
    untouched = torch.cat([level.flatten(), torch.zeros(9, dtype=torch.bool)])
    poisoned = {**arguments, "value": arguments["value"].detach().clone()}
    poisoned["value"][:, untouched] = math.nan
    with running(way):
        assert torch.equal(call(OP, poisoned), call(OP, arguments))


@each_way(OP, ways=("cpu", "triton", "emulated"))
def test_a_corner_that_does_not_exist_is_not_multiplied_by_a_neighbouring_nan(way):
    arguments = ms_deform_attn_arguments(levels=((2, 2), (1, 1)), queries=1, batch=1, points=1)
    value = arguments["value"].detach().clone()
    value[:, 4:] = math.nan  # the second level
    locations = torch.full_like(arguments["sampling_locations"].detach(), 1.2)  # beyond the last pixel of the first
    locations[:, :, :, 1] = 5.0
    with running(way):
        assert call(OP, arguments | {"value": value, "sampling_locations": locations}).isfinite().all()


# ---- levels and points -----------------------------------------------------------------------------------------------


def test_forms_of_levels_and_starts():
    arguments = ms_deform_attn_arguments()
    expected = rk.ms_deform_attn(**arguments)
    for shapes in (torch.tensor(LEVELS), torch.tensor(LEVELS, dtype=torch.int32), [*map(list, LEVELS)],
                   [torch.Size(pair) for pair in LEVELS], [tuple(map(np.int64, pair)) for pair in LEVELS]):  # fmt: skip
        for starts in (None, (0, 35, 47), torch.tensor([0, 35, 47]), [np.int32(0), 35, 47]):
            given_so = {**arguments, "spatial_shapes": shapes, "level_start_index": starts}
            assert torch.equal(rk.ms_deform_attn(**given_so), expected)


@pytest.mark.parametrize("points", [[3, 1, 2], torch.tensor([3, 1, 2]), torch.tensor([3, 1, 2], dtype=torch.int32)])
def test_forms_of_points(points):
    arguments = ms_deform_attn_arguments(counts=(3, 1, 2))
    assert torch.equal(rk.ms_deform_attn(**arguments | {"points": points}), rk.ms_deform_attn(**arguments))


@each_way(OP)
def test_levels_may_lie_apart_or_overlap(way):
    arguments = ms_deform_attn_arguments(points=1, **FEW)
    check(OP, {**arguments, "level_start_index": (0, 3)}, way)
    padded = converted(arguments, torch.float32)
    padded["value"] = F.pad(arguments["value"].detach(), (0, 0, 0, 0, 3, 2), value=math.nan).requires_grad_()
    found, expected = results(OP, padded | {"level_start_index": (3, 15)}, way), results(OP, arguments, way)
    expected["grad value"] = F.pad(expected["grad value"], (0, 0, 0, 0, 3, 2))
    assert_same(found, expected, ["grad value"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@each_dtype
def test_equal_counts_are_the_unpacked_form(dtype, backend):
    arguments = ms_deform_attn_arguments(dtype=dtype, points=3)
    packed = converted(arguments, dtype) | {"points": (3, 3, 3)}
    for name in ("sampling_locations", "attention_weights"):
        packed[name] = packed[name].detach().flatten(3, 4).requires_grad_()
    found, expected = results(OP, packed, backend), results(OP, arguments, backend)
    assert_same({name: tensor.view(expected[name].shape) for name, tensor in found.items()}, expected)


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=5),
    channels=st.integers(1, 40), heads=st.integers(1, 3), queries=st.integers(1, 20), packed=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_properties(levels, channels, heads, queries, packed, seed):
    counts = tuple(count for *_, count in levels)
    arguments = ms_deform_attn_arguments(
        levels=tuple(size for *size, _ in levels), channels=channels, heads=heads, queries=queries, points=counts[0],
        counts=counts if packed else None, dtype=torch.float64, seed=seed,
    )  # fmt: skip
    found = results(OP, arguments, "cpu")
    assert_same(found, expected := results(OP, arguments, "reference"), expected, 1e-11)
    order = torch.randperm(queries)
    permuted = {name: arguments[name][:, order] for name in ("sampling_locations", "attention_weights")}
    assert torch.equal(rk.ms_deform_attn(**{**arguments, **permuted}), found["output"][:, order])
    twice = {**arguments, "attention_weights": 2 * arguments["attention_weights"]}
    assert torch.equal(rk.ms_deform_attn(**twice), 2 * found["output"])
    constant = {**arguments, "value": torch.ones_like(arguments["value"])}
    assert (rk.ms_deform_attn(**constant) <= 1 + 1e-12).all()  # weights sum to 1, bilinear weights to at most 1


# ---- plain and fused: autocast, memory, order of sums ----------------------------------------------------------------


@pytest.mark.parametrize("op", BOTH)
def test_autocast_lowers_value_and_no_coordinate(op):
    arguments = declaration(op).arguments()
    by_hand = call(op, {**arguments, "value": arguments["value"].bfloat16()})
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", torch.bfloat16), running(backend):
            output = call(op, arguments)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, by_hand, rtol=0.01, atol=0.01)
        assert backend == "reference" or torch.equal(output, by_hand)


@each_way(*BOTH, ways=("cpu", "triton", "emulated"))
def test_backward_keeps_the_inputs_and_nothing_else(op, way):
    options = {"masked": True} if op == "ms_deform_attn_fused" else {}
    arguments = declaration(op).arguments(queries=3, **options)
    with running(way):
        _, kept = kept_tensors(lambda: call(op, arguments))
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for _, tensor in named_tensors(arguments)}


@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", ["queries last", "heads first"])
def test_no_copy_of_value(op, dtype, layout):
    arguments = declaration(op).arguments(
        levels=((64, 64),), heads=8, channels=32, queries=2000, points=2, batch=1, dtype=dtype
    )
    value = arguments["value"].detach()
    arguments["value"] = value.transpose(1, 2).contiguous().transpose(1, 2) if layout == "heads first" else value
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call(op, arguments)
    used = max(event.self_cpu_memory_usage for event in profile.events())
    assert 2000 * 8 * 32 * dtype.itemsize <= used < value.nbytes, "the output, and nothing as large as value"


@on_triton
@pytest.mark.parametrize("op", BOTH)
def test_triton_sums_the_gradient_of_value_in_a_fixed_order_where_asked_for(op, monkeypatch):
    from route_kernels.triton import launch
    from route_kernels.triton.ms_deform_attn.backward import ms_deform_attn_backward

    sums_of_atomics, run = [], launch.run

    def noted(function, grid, *arguments):
        if function is ms_deform_attn_backward.function:
            sums_of_atomics.append(arguments[1])
        run(function, grid, *arguments)

    monkeypatch.setattr(launch, "run", noted)
    for way in ("triton", "triton in order"):
        results(op, declaration(op).arguments(**FEW), way)
    assert sums_of_atomics[0] is not None and sums_of_atomics[1:] == [None]


@on_triton
@pytest.mark.parametrize("sizes", [(1, 0, 16, 2**24), (2**31, 7, 48, 3)], ids=str)
def test_no_size_of_a_level_makes_triton_compile_anew(sizes):
    from route_kernels.triton.ms_deform_attn.host import Points

    points = Points(torch.empty(0), torch.empty(0), None, None, (*sizes, 0, 2**33, 4, 0))
    assert all(number % 16 and number != 1 for number in points.packed_levels())
    assert [(number >> 1) - 1 for number in points.packed_levels()] == [*sizes[:2], 0, 4, *sizes[2:], 2**33, 0]


# ---- the tests themselves --------------------------------------------------------------------------------------------


def corners_aligned(spatial_shapes, sampling_locations, **given):
    """The mistake of reading location 0 as the centre of the first pixel and 1 as that of the last."""
    sizes = sampling_locations.new_tensor([(w, h) for h, w in spatial_shapes])[:, None]
    wrong = (sampling_locations * (sizes - 1) + 0.5) / sizes
    return rk.ms_deform_attn(spatial_shapes=spatial_shapes, sampling_locations=wrong, **given)


def rows_for_columns(sampling_locations, **given):
    return rk.ms_deform_attn(sampling_locations=sampling_locations.flip(-1), **given)


def weight_not_differentiated(attention_weights, **given):
    return rk.ms_deform_attn(attention_weights=attention_weights.detach() + 0 * attention_weights, **given)


@each_dtype
@pytest.mark.parametrize("mistake", [corners_aligned, rows_for_columns, weight_not_differentiated])
def test_a_mistake_is_caught(mistake, dtype):
    with pytest.raises(AssertionError, match="RMS error"):
        check_accuracy(OP, ms_deform_attn_arguments(dtype=dtype, queries=30), mistake)
