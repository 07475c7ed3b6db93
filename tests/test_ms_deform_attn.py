"""Multi-scale deformable attention against its equations and grid_sample, with tolerances measured on PyTorch's own."""

import math

import numpy as np
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
    ms_deform_attn_arguments,
    outcome,
)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LEVELS = ((5, 7), (3, 4), (1, 1))

SHAPES = {  # channels around vectors of 2 to 16 lanes, points around blocks of 16, queries around batches of 8
    "one of each": dict(levels=((1, 1),), batch=1, heads=1, channels=1, queries=1, points=1),
    "3 channels": dict(channels=3, queries=8, points=1),
    "8 channels": dict(channels=8, queries=17, heads=3),
    "16 channels": dict(channels=16, queries=7, points=4),
    "17 channels": dict(channels=17, queries=5, points=3, batch=1),
    "32 channels, few queries": dict(levels=((20, 21),), channels=32, queries=3, points=4),
    "32 channels, many queries": dict(levels=((6, 5), (3, 3)), channels=32, queries=40, points=8),
    "64 channels": dict(channels=64, queries=9, points=5, heads=1),
    "100 channels": dict(channels=100, queries=10, points=6, batch=1),
    "16 levels": dict(levels=((2, 3), (4, 1)) * 8, channels=4, points=1),
    "20 points": dict(levels=((3, 5),), channels=5, points=20),
    "33 points": dict(levels=((3, 5), (1, 7), (9, 1)), channels=2, points=11),
    "rows and columns": dict(levels=((1, 9), (9, 1), (1, 1)), channels=6),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients(sizes, dtype):
    check_accuracy("ms_deform_attn", ms_deform_attn_arguments(dtype=dtype, **sizes))


@pytest.mark.parametrize(
    "dtype, point_dtype",
    [("bf16", "f32"), ("f16", "f32"), ("f32", "bf16"), ("f32", "f16"), ("f16", "bf16"), ("f64", "f32"), ("f64", "f16")],
)
def test_points_of_another_dtype(dtype, point_dtype):
    dtype, point_dtype = DTYPES[dtype], DTYPES[point_dtype]
    arguments = ms_deform_attn_arguments(dtype=dtype, point_dtype=point_dtype)
    check_accuracy("ms_deform_attn", arguments)
    results = outcome(rk.ms_deform_attn, arguments, torch.ones(2, 9, 16))
    assert results["output"].dtype == results["grad value"].dtype == dtype
    assert results["grad sampling_locations"].dtype == results["grad attention_weights"].dtype == point_dtype


@pytest.mark.parametrize("backend", [None, "reference"])
def test_equals_grid_sample(backend):
    arguments = ms_deform_attn_arguments(dtype=torch.float64, queries=30, points=4)
    grad_output = torch.randn(2, 30, 16, dtype=torch.float64)
    expected = outcome(EAGER["ms_deform_attn"], arguments, grad_output)
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn, arguments, grad_output)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_gradcheck():
    arguments = ms_deform_attn_arguments(dtype=torch.float64, queries=3, channels=3, points=2, batch=1)
    value, shapes, starts, locations, weights = arguments.values()

    def sample(value, locations, weights):
        return rk.ms_deform_attn(value, shapes, starts, locations, weights)

    assert torch.autograd.gradcheck(sample, (value, locations, weights))


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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
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
def test_gradients_on_knots_and_edges_are_the_references(dtype):
    pixels = torch.cartesian_prod(torch.arange(-2.0, 10), torch.arange(-2.0, 6)).to(dtype)
    locations = ((pixels + 0.5) / torch.tensor([8.0, 4.0])).to(dtype).view(1, -1, 1, 1, 1, 2)
    arguments = {
        "value": torch.randint(-4, 5, (1, 32, 1, 4)).to(dtype).requires_grad_(),
        "spatial_shapes": ((4, 8),),
        "level_start_index": None,
        "sampling_locations": locations.requires_grad_(),
        "attention_weights": torch.randint(1, 4, locations.shape[:-1]).to(dtype).requires_grad_(),
    }
    grad_output = torch.randint(-3, 4, (1, len(pixels), 4)).to(dtype)
    results = outcome(rk.ms_deform_attn, arguments, grad_output)
    with rk.backend("reference"):
        expected = outcome(rk.ms_deform_attn, arguments, grad_output)
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name


NOWHERE = {
    "NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf, "1e30": 1e30, "-1e30": -1e30,
    "beyond int32": 3e9, "beyond int64": 2e19, "a pixel outside": 1.5, "a pixel before": -0.5,
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("place", NOWHERE.values(), ids=NOWHERE)
@pytest.mark.parametrize("axis", [0, 1, slice(None)], ids=["x", "y", "both"])
def test_a_sample_that_is_nowhere_adds_nothing(place, axis, dtype, backend):
    arguments = ms_deform_attn_arguments(levels=((2, 2), (5, 3)), queries=11, dtype=dtype)
    lost = torch.rand(2, 11, 2, 2, 2) < 0.4
    with torch.no_grad():
        arguments["sampling_locations"][..., axis][lost] = place
    without = {**arguments, "attention_weights": arguments["attention_weights"].detach().masked_fill(lost, 0)}
    without["sampling_locations"] = arguments["sampling_locations"].detach().masked_fill(lost.unsqueeze(-1), 0.5)
    grad_output = torch.randn(2, 11, 16)
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn, arguments, grad_output)
        expected = outcome(rk.ms_deform_attn, map_tensors(without, lambda x: x.detach().requires_grad_()), grad_output)
    torch.testing.assert_close(results["output"], expected["output"])
    torch.testing.assert_close(results["grad value"], expected["grad value"])
    assert (results["grad sampling_locations"][lost] == 0).all() and (
        results["grad attention_weights"][lost] == 0
    ).all()
    kept = results["grad sampling_locations"][~lost], expected["grad sampling_locations"][~lost]
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("queries", [2, 60], ids=["few", "many"])
def test_poison_that_no_sample_touches_stays_where_it_is(queries):
    arguments = ms_deform_attn_arguments(levels=((9, 9), (3, 3)), channels=16, queries=queries, points=4)
    with torch.no_grad():
        arguments["sampling_locations"].clamp_(0.4, 0.6)
        arguments["sampling_locations"][:, 0, :, :, 0] = math.nan  # reads nothing, not even the first row
    level = torch.ones(9, 9, dtype=torch.bool)
    level[2:7, 2:7] = False
    untouched = torch.cat([level.flatten(), torch.zeros(9, dtype=torch.bool)])
    clean = rk.ms_deform_attn(**arguments)
    poisoned = {**arguments, "value": arguments["value"].detach().clone()}
    poisoned["value"][:, untouched] = math.nan
    assert torch.equal(rk.ms_deform_attn(**poisoned), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_a_level_without_pixels_adds_nothing(dtype):
    full = ms_deform_attn_arguments(levels=((4, 3), (0, 5), (2, 2), (3, 0)), dtype=dtype)
    results = outcome(rk.ms_deform_attn, full, torch.ones(2, 9, 16))
    some = converted(full, dtype) | {"spatial_shapes": ((4, 3), (2, 2))}
    for name in ("sampling_locations", "attention_weights"):
        some[name] = some[name].detach()[:, :, :, [0, 2]].requires_grad_()
    expected = outcome(rk.ms_deform_attn, some, torch.ones(2, 9, 16))
    assert torch.equal(results["output"], expected["output"]) and torch.equal(
        results["grad value"], expected["grad value"]
    )
    for name in ("grad sampling_locations", "grad attention_weights"):
        assert torch.equal(results[name][:, :, :, [0, 2]], expected[name]) and not results[name][:, :, :, [1, 3]].any()


# ---- levels, strides, empty dimensions -------------------------------------------------------------------------------


def test_forms_of_levels_and_starts():
    arguments = ms_deform_attn_arguments()
    expected = rk.ms_deform_attn(**arguments)
    for shapes in (torch.tensor(LEVELS), torch.tensor(LEVELS, dtype=torch.int32), [*map(list, LEVELS)],
                   [torch.Size(pair) for pair in LEVELS], [tuple(map(np.int64, pair)) for pair in LEVELS]):  # fmt: skip
        for starts in (None, (0, 35, 47), torch.tensor([0, 35, 47]), [np.int32(0), 35, 47]):
            given_so = {**arguments, "spatial_shapes": shapes, "level_start_index": starts}
            assert torch.equal(rk.ms_deform_attn(**given_so), expected)


def test_levels_may_lie_apart_or_overlap():
    arguments = ms_deform_attn_arguments(levels=((4, 5), (3, 3), (6, 4)))
    grad_output = torch.randn(2, 9, 16)
    padded = converted(arguments, torch.float32)
    padded["value"] = F.pad(arguments["value"].detach(), (0, 0, 0, 0, 7, 9), value=math.nan).requires_grad_()
    padded["level_start_index"] = (7, 27, 36)
    results, expected = (outcome(rk.ms_deform_attn, given, grad_output) for given in (padded, arguments))
    assert torch.equal(results["output"], expected["output"])
    assert torch.equal(results["grad value"], F.pad(expected["grad value"], (0, 0, 0, 0, 7, 9)))
    check_accuracy("ms_deform_attn", {**arguments, "level_start_index": (0, 3, 10)})


def projected(tensor):
    """[B, S, H, D] as a view of [B, H, S, D], as some modules keep it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor):
    padded = F.pad(tensor, (3, 2, 1, 0, 1, 1))
    return padded[:, 1:-1, 1:, 3:-2] if tensor.dim() == 4 else padded[..., 1:-1, 1:, 3:-2]


def last_reversed(tensor):
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("queries", [3, 50], ids=["few", "many"])
@pytest.mark.parametrize("view", [projected, sliced, last_reversed])
def test_views(view, queries, dtype):
    arguments = ms_deform_attn_arguments(channels=16, queries=queries, dtype=dtype)
    viewed = map_tensors(arguments, lambda tensor: view(tensor.detach()).requires_grad_())
    assert not viewed["value"].is_contiguous()
    grad_output = torch.randn(2, queries, 32)
    expected = outcome(rk.ms_deform_attn, arguments, grad_output)
    for name, result in outcome(rk.ms_deform_attn, viewed, grad_output).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(
    "grad_output",
    [torch.ones(()).expand(2, 9, 16), torch.randn(2, 1, 16).expand(2, 9, 16), torch.randn(2, 16, 9).mT,
     torch.randn(9, 2, 16).transpose(0, 1), torch.randn(2, 9, 32)[..., ::2]],
    ids=["one number", "per image", "transposed", "queries first", "every second"],
)  # fmt: skip
def test_incoming_gradient_of_any_strides(grad_output):
    arguments = ms_deform_attn_arguments()
    contiguous = outcome(rk.ms_deform_attn, arguments, grad_output.contiguous())
    for name, result in outcome(rk.ms_deform_attn, arguments, grad_output).items():
        assert torch.equal(result, contiguous[name]), name


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "channels", "points", "levels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_empty_dimensions(empty, dtype, backend):
    arguments = ms_deform_attn_arguments(dtype=dtype, **{empty: () if empty == "levels" else 0})
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn, arguments, torch.ones(()).expand_as(rk.ms_deform_attn(**arguments)))
    assert results["output"].shape == {"batch": (0, 9, 16), "queries": (2, 0, 16)}.get(
        empty, (2, 9, 16 if empty in ("points", "levels") else 0)
    )
    assert all((tensor == 0).all() for tensor in results.values())


@pytest.mark.parametrize("backend", [None, "reference"])
def test_no_position_at_all(backend):
    with rk.backend(backend):
        arguments = ms_deform_attn_arguments(levels=((0, 0), (3, 0)))
        results = outcome(rk.ms_deform_attn, arguments, torch.ones(2, 9, 16))
    assert results["grad value"].shape == (2, 0, 2, 8) and all((tensor == 0).all() for tensor in results.values())


# ---- autocast, properties --------------------------------------------------------------------------------------------


def test_autocast_lowers_value_and_no_coordinate():
    arguments = ms_deform_attn_arguments()
    by_hand = rk.ms_deform_attn(**{**arguments, "value": arguments["value"].bfloat16()})
    for backend in (None, "reference"):
        with torch.autocast("cpu", torch.bfloat16), rk.backend(backend):
            output = rk.ms_deform_attn(**arguments)
            assert rk.ms_deform_attn(**converted(arguments, torch.float64)).dtype == torch.float64
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, by_hand, rtol=0.01, atol=0.01)
        if backend is None:
            assert torch.equal(output, by_hand)


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
    channels=st.integers(1, 40), heads=st.integers(1, 3), queries=st.integers(1, 20), points=st.integers(1, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_properties(levels, channels, heads, queries, points, seed):
    arguments = ms_deform_attn_arguments(
        levels=tuple(levels), channels=channels, heads=heads, queries=queries, points=points, dtype=torch.float64,
        seed=seed,
    )  # fmt: skip
    output = rk.ms_deform_attn(**arguments)
    with rk.backend("reference"):
        torch.testing.assert_close(output, rk.ms_deform_attn(**arguments), rtol=1e-11, atol=1e-11)
    order = torch.randperm(queries)
    permuted = {name: arguments[name][:, order] for name in ("sampling_locations", "attention_weights")}
    assert torch.equal(rk.ms_deform_attn(**{**arguments, **permuted}), output[:, order])
    twice = {**arguments, "attention_weights": 2 * arguments["attention_weights"]}
    assert torch.equal(rk.ms_deform_attn(**twice), 2 * output)
    constant = {**arguments, "value": torch.ones_like(arguments["value"])}
    assert (rk.ms_deform_attn(**constant) <= 1 + 1e-12).all()  # weights sum to 1, bilinear weights to at most 1


# ---- the tests themselves --------------------------------------------------------------------------------------------


def corners_aligned(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    """The mistake of reading location 0 as the centre of the first pixel and 1 as that of the last."""
    sizes = sampling_locations.new_tensor([(w, h) for h, w in spatial_shapes])[:, None]
    wrong = (sampling_locations * (sizes - 1) + 0.5) / sizes
    return rk.ms_deform_attn(value, spatial_shapes, level_start_index, wrong, attention_weights)


def rows_for_columns(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    return rk.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations.flip(-1), attention_weights
    )  # fmt: skip


def weight_not_differentiated(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    weights = attention_weights.detach() + 0 * attention_weights
    return rk.ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, weights)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mistake", [corners_aligned, rows_for_columns, weight_not_differentiated])
def test_a_mistake_is_caught(mistake, dtype):
    with pytest.raises(AssertionError, match="RMS error"):
        check_accuracy("ms_deform_attn", ms_deform_attn_arguments(dtype=dtype, queries=30), mistake)
