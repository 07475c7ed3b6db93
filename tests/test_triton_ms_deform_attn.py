"""Deformable attention in Triton, plain and fused, in the interpreter where there is no GPU, against float64."""

import math

import pytest
import torch
from torch.nn import functional as F

import route_kernels as rk
from route_kernels.testing import (
    BAD_INPUTS,
    check_accuracy,
    converted,
    map_tensors,
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    named_tensors,
    outcome,
)

pytest.importorskip("triton")

runs, reason = rk.can_run("ms_deform_attn", "triton", torch.empty(0))
pytestmark = pytest.mark.skipif(not runs, reason=reason)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ARGUMENTS = {"ms_deform_attn": ms_deform_attn_arguments, "ms_deform_attn_fused": ms_deform_attn_fused_arguments}
FEW = dict(levels=((3, 4), (1, 2)), batch=1, queries=5)  # the interpreter takes a program after the other
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_op = pytest.mark.parametrize("op", ARGUMENTS)

SHAPES = {  # channels of no power of two, more queries than a block, levels of one pixel, row and column
    "one of each": dict(levels=((1, 1),), batch=1, heads=1, channels=1, queries=1, points=1),
    "3 channels": dict(levels=((5, 7), (3, 4)), channels=3, queries=8, points=1),
    "several blocks": dict(levels=((6, 5),), channels=16, queries=37, points=2, heads=1),
    "24 channels": dict(levels=((4, 3), (2, 2)), channels=24, queries=11, points=2, batch=1),
    "rows and columns": dict(levels=((1, 9), (9, 1), (1, 1)), channels=8, batch=1, points=3),
    "8 levels": dict(levels=((2, 3), (4, 1)) * 4, channels=4, points=1, batch=1),
}


def on_triton(op):
    def function(**arguments):
        with rk.backend("triton"):
            return getattr(rk, op)(**arguments)

    return function


@pytest.fixture(params=[False, True], ids=["atomics", "deterministic"])
def deterministic(request):
    """Both ways to sum the gradient of value."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


# ---- accuracy --------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@each_op
def test_output_and_gradients(op, sizes, dtype):
    options = dict(coordinates=4, masked=True) if op == "ms_deform_attn_fused" else {}
    check_accuracy(op, ARGUMENTS[op](dtype=dtype, **sizes, **options), on_triton(op))


REFERENCES = {
    "point": dict(coordinates=2),
    "point a level": dict(coordinates=2, reference_levels=2),
    "box": dict(coordinates=4),
    "box a level": dict(coordinates=4, reference_levels=2, masked=True),
}


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_references(reference, deterministic):
    arguments = ms_deform_attn_fused_arguments(dtype=torch.float64, **FEW, **reference)
    assert_as_reference("ms_deform_attn_fused", arguments)


@pytest.mark.parametrize("counts", [(3, 1), (0, 3), (1, 0)], ids=str)
@each_op
def test_counts_of_points(op, counts, deterministic):
    if op == "ms_deform_attn":
        arguments = ms_deform_attn_arguments(counts=counts, dtype=torch.float64, **FEW)
    else:
        arguments = ms_deform_attn_fused_arguments(dtype=torch.float64, coordinates=4, reference_levels=2, **FEW)
        for name in ("sampling_offsets", "attention_logits"):
            arguments[name] = arguments[name].detach()[:, :, :, : sum(counts)].requires_grad_()
        arguments["points"] = counts
    assert_as_reference(op, arguments)


def test_levels_may_lie_apart_or_overlap(deterministic):
    arguments = ms_deform_attn_arguments(dtype=torch.float64, points=1, **FEW)
    assert_as_reference("ms_deform_attn", arguments | {"level_start_index": (0, 3)})
    arguments["value"] = F.pad(arguments["value"].detach(), (0, 0, 0, 0, 3, 2), value=math.nan).requires_grad_()
    assert_as_reference("ms_deform_attn", arguments | {"level_start_index": (3, 15)})


def test_softmax_of_more_points_than_are_unrolled(monkeypatch):
    from route_kernels.triton.ms_deform_attn import host as settings

    monkeypatch.setattr(settings, "MOST_POINTS_UNROLLED", 3)
    assert_as_reference("ms_deform_attn_fused", ms_deform_attn_fused_arguments(dtype=torch.float64, **FEW))


def test_softmax_adjoint_of_more_points_than_a_tile_holds():
    from route_kernels.triton.ms_deform_attn_fused import softmax_adjoint, softmax_grid

    logits = torch.randn(1, 3, 2, 131, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 3, 2, 131, dtype=torch.float64)
    (expected,) = torch.autograd.grad(logits.softmax(-1), logits, grad)
    softmax_adjoint[softmax_grid(logits, grad.dtype)](grad, grad, logits.detach())
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dtype, point_dtype", [("bf16", "f32"), ("f16", "bf16"), ("f32", "f16"), ("f64", "f32")], ids=str
)
@each_op
def test_points_of_another_dtype(op, dtype, point_dtype):
    arguments = ARGUMENTS[op](dtype=DTYPES[dtype], point_dtype=DTYPES[point_dtype], queries=5)
    results = outcome(on_triton(op), arguments, torch.ones(2, 5, 16))
    with rk.backend("reference"):
        expected = outcome(getattr(rk, op), arguments, torch.ones(2, 5, 16))
    for name, result in results.items():
        assert result.dtype == expected[name].dtype, name
        eps = torch.finfo(result.dtype).eps
        torch.testing.assert_close(result, expected[name], rtol=8 * eps, atol=32 * eps if eps > 1e-6 else 1e-5)


def assert_as_reference(op, arguments, rtol=1e-11, atol=1e-11):
    """Output and gradients, to the last bits of float64."""
    with rk.backend("reference"):
        output = getattr(rk, op)(**arguments)
        grad_output = torch.randn(output.shape, dtype=torch.float64)
        expected = outcome(getattr(rk, op), arguments, grad_output)
    for name, result in outcome(on_triton(op), arguments, grad_output).items():
        torch.testing.assert_close(result, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name} {m}")


# ---- where samples fall ----------------------------------------------------------------------------------------------

NOWHERE = {"NaN": math.nan, "infinity": math.inf, "1e30": 1e30, "beyond int32": -3e9, "beyond int64": 2e19,
           "a pixel outside": 1.5}  # fmt: skip


@pytest.mark.parametrize("place", NOWHERE.values(), ids=NOWHERE)
def test_a_sample_that_is_nowhere_adds_nothing(place):
    nowhere_adds_nothing(place)


def test_a_sample_that_is_nowhere_adds_nothing_to_deterministic_sums(deterministic):
    nowhere_adds_nothing(math.nan)


def nowhere_adds_nothing(place):
    arguments = ms_deform_attn_arguments(levels=((2, 2), (5, 3)), queries=5)
    lost = torch.rand(2, 5, 2, 2, 2) < 0.4
    with torch.no_grad():
        arguments["sampling_locations"][..., 0][lost] = place
        arguments["attention_weights"][lost] = math.nan
    without = map_tensors(arguments, lambda x: x.detach().clone())
    without["attention_weights"][lost] = 0
    without["sampling_locations"][lost] = 0.5
    grad_output = torch.randn(2, 5, 16)
    results = outcome(on_triton("ms_deform_attn"), arguments, grad_output)
    leaves = map_tensors(without, lambda x: x.requires_grad_())
    expected = outcome(on_triton("ms_deform_attn"), leaves, grad_output)
    for name in ("output", "grad value"):
        torch.testing.assert_close(results[name], expected[name])
    assert not results["grad sampling_locations"][lost].any() and not results["grad attention_weights"][lost].any()
    kept = results["grad sampling_locations"][~lost], expected["grad sampling_locations"][~lost]
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("argument", ["sampling_offsets", "reference_points"])
@pytest.mark.parametrize("place", [math.nan, math.inf, 1e30], ids=str)
@pytest.mark.parametrize("coordinates", [2, 4])
def test_a_place_that_is_nowhere_has_finite_gradients(coordinates, place, argument):
    arguments = ms_deform_attn_fused_arguments(coordinates=coordinates, queries=6, dtype=torch.float64)
    with torch.no_grad():
        arguments[argument][:, ::3, :, 0] = place
    assert_as_reference("ms_deform_attn_fused", arguments, rtol=1e-9, atol=1e-9)


def test_knots_edges_and_half_pixels():
    pixels = torch.cartesian_prod(torch.arange(-1.5, 5, 0.25), torch.arange(-1.5, 3, 0.25))
    locations = ((pixels + 0.5) / torch.tensor([4.0, 2.0])).view(1, -1, 1, 1, 1, 2)
    arguments = {
        "value": torch.randint(-4, 5, (1, 8, 1, 4)).float().requires_grad_(),
        "spatial_shapes": ((2, 4),),
        "level_start_index": None,
        "sampling_locations": locations.requires_grad_(),
        "attention_weights": torch.randint(1, 4, locations.shape[:-1]).float().requires_grad_(),
    }
    grad_output = torch.randint(-3, 4, (1, len(pixels), 4)).float()
    results = outcome(on_triton("ms_deform_attn"), arguments, grad_output)
    with rk.backend("reference"):
        expected = outcome(rk.ms_deform_attn, arguments, grad_output)
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name  # powers of two and few bits: every step is exact


def test_masked_positions_count_as_zero_whatever_they_hold(deterministic):
    arguments = ms_deform_attn_fused_arguments(masked=True, **FEW)
    assert arguments["value_mask"].any()
    mask = arguments["value_mask"]
    fill = arguments["value"].detach().masked_fill
    zeros = arguments | {"value": fill(mask[:, :, None, None], 0).requires_grad_(), "value_mask": None}
    poisoned = arguments | {"value": fill(mask[:, :, None, None], math.nan).requires_grad_()}
    grad_output = torch.randn(1, 5, 16)
    results, expected = (outcome(on_triton("ms_deform_attn_fused"), x, grad_output) for x in (poisoned, zeros))
    expected["grad value"][mask] = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, msg=name)


def test_softmax_of_large_and_infinite_logits():
    arguments = ms_deform_attn_fused_arguments(dtype=torch.float64, queries=6)
    with torch.no_grad():
        arguments["attention_logits"][:, :3] *= 1000
        arguments["attention_logits"][:, 3:, :, ::4] = -math.inf
    assert_as_reference("ms_deform_attn_fused", arguments)


# ---- strides, empty dimensions, bad inputs ---------------------------------------------------------------------------


def heads_first(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() > 2 else tensor


def sliced(tensor):
    return F.pad(tensor, (3, 2))[..., 3:-2]


def reversed_dimensions(tensor):
    dims = tuple(reversed(range(tensor.dim())))
    return tensor.permute(dims).contiguous().permute(dims)


@pytest.mark.parametrize("view", [heads_first, sliced, reversed_dimensions])
@each_op
def test_views(op, view, deterministic):
    options = dict(coordinates=4, reference_levels=2, masked=True) if op == "ms_deform_attn_fused" else {}
    arguments = ARGUMENTS[op](**FEW, **options)
    viewed = map_tensors(arguments, lambda x: view(x.detach()).requires_grad_(x.requires_grad))
    assert not viewed["value"].is_contiguous()
    grad_output = torch.randn(1, 16, 5)
    expected = outcome(on_triton(op), arguments, grad_output.mT.contiguous())
    for name, result in outcome(on_triton(op), viewed, grad_output.mT).items():
        torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "channels", "points", "pixels", "levels"])
@each_op
def test_empty_dimensions(op, empty, deterministic):
    sizes = {"levels": ((0, 0), (3, 0), (0, 2))} if empty == "pixels" else {empty: () if empty == "levels" else 0}
    arguments = ARGUMENTS[op](**sizes, dtype=torch.bfloat16)
    results = outcome(on_triton(op), arguments, torch.ones(()).expand_as(on_triton(op)(**arguments)))
    assert results["grad value"].shape == arguments["value"].shape
    assert all((tensor == 0).all() for tensor in results.values())


@pytest.mark.parametrize("bad", [bad for bad in BAD_INPUTS if bad.op in ARGUMENTS], ids=lambda bad: bad.name)
def test_bad_inputs(bad):
    with pytest.raises(bad.error, match=bad.message):
        on_triton(bad.op)(**bad.arguments())


# ---- determinism, memory ---------------------------------------------------------------------------------------------


def test_every_element_of_poisoned_outputs_is_written(deterministic):
    from route_kernels.triton.ms_deform_attn import backward

    arguments = ms_deform_attn_arguments(**FEW)
    value, locations, weights = (tensor.detach() for _, tensor in named_tensors(arguments))
    locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    grads = [torch.full_like(tensor, math.nan) for tensor in (value, locations, weights)]
    levels, in_order = [3, 4, 1, 2, 0, 12, 2, 2], torch.are_deterministic_algorithms_enabled()
    backward(torch.randn(1, 5, 16), value, levels, locations, weights, in_order, grads)
    assert all(grad.isfinite().all() for grad in grads)


@each_op
def test_the_gradient_of_value_is_summed_in_a_fixed_order_where_asked_for(op, monkeypatch):
    from route_kernels.triton import launch
    from route_kernels.triton.ms_deform_attn.backward import ms_deform_attn_backward

    sums_of_atomics, run = [], launch.run

    def noted(function, grid, *arguments):
        if function is ms_deform_attn_backward.function:
            sums_of_atomics.append(arguments[1])
        run(function, grid, *arguments)

    monkeypatch.setattr(launch, "run", noted)
    arguments, grad_output = ARGUMENTS[op](**FEW | {"queries": 12}), torch.randn(1, 12, 16)
    by_atomics = outcome(on_triton(op), arguments, grad_output)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (outcome(on_triton(op), arguments, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert sums_of_atomics[0] is not None and sums_of_atomics[1:] == [None, None]
    for name, tensor in once.items():
        assert torch.equal(again[name], tensor), name
        torch.testing.assert_close(by_atomics[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@each_op
def test_compiled_for_any_size(op):
    compiled = torch.compile(on_triton(op), fullgraph=True, dynamic=True, backend="aot_eager")
    for levels in (((3, 4), (1, 2)), ((2, 5), (4, 3))):
        arguments = ARGUMENTS[op](**FEW | {"levels": levels})
        grad_output = torch.randn(1, 5, 16)
        expected = outcome(on_triton(op), arguments, grad_output)
        for name, tensor in outcome(compiled, arguments, grad_output).items():
            torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.mark.parametrize("sizes", [(1, 0, 16, 2**24), (2**31, 7, 48, 3)], ids=str)
def test_no_size_of_a_level_makes_triton_compile_anew(sizes):
    from route_kernels.triton.ms_deform_attn.host import Points

    points = Points(torch.empty(0), torch.empty(0), None, None, (*sizes, 0, 2**33, 4, 0))
    assert all(number % 16 and number != 1 for number in points.packed_levels())
    assert [(number >> 1) - 1 for number in points.packed_levels()] == [*sizes[:2], 0, 4, *sizes[2:], 2**33, 0]


@each_op
def test_backward_keeps_the_inputs_and_nothing_else(op):
    arguments, kept = ARGUMENTS[op](queries=3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        on_triton(op)(**arguments)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for _, tensor in named_tensors(arguments)}


def test_a_mistake_is_caught():
    arguments = ms_deform_attn_fused_arguments(coordinates=4)
    arguments = converted(arguments, torch.float32)

    def flipped(**given):
        return on_triton("ms_deform_attn_fused")(**given | {"sampling_offsets": given["sampling_offsets"].flip(-1)})

    with pytest.raises(AssertionError, match="RMS error"):
        check_accuracy("ms_deform_attn_fused", arguments, flipped)
