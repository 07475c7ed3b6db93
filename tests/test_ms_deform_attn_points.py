"""Levels with counts of points of their own: packed locations and weights, level after level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import route_kernels as rk
from route_kernels.testing import EAGER, check_accuracy, converted, ms_deform_attn_arguments, outcome

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
COUNTS = [(3, 1, 2), (4, 1, 1), (17, 1, 15), (1, 0, 5), (0, 6, 0)]


def grid_sampled(arguments):
    """The same call without the levels that have no point: grid_sample takes no empty grid."""
    kept = [level for level, count in enumerate(arguments["points"]) if count]
    starts, position = [], 0
    for height, width in arguments["spatial_shapes"]:
        starts.append(position)
        position += height * width
    return arguments | {
        "spatial_shapes": tuple(arguments["spatial_shapes"][level] for level in kept),
        "level_start_index": tuple(starts[level] for level in kept),
        "points": tuple(arguments["points"][level] for level in kept),
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_output_and_gradients(counts, dtype):
    arguments = ms_deform_attn_arguments(counts=counts, dtype=dtype, queries=20)
    every_level = {name: arguments[name] for name in ("spatial_shapes", "level_start_index", "points")}
    check_accuracy("ms_deform_attn", grid_sampled(arguments), lambda **given: rk.ms_deform_attn(**given | every_level))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_grid_sample(counts, backend):
    arguments = ms_deform_attn_arguments(counts=counts, dtype=torch.float64, queries=12)
    grad_output = torch.randn(2, 12, 16, dtype=torch.float64)
    expected = outcome(EAGER["ms_deform_attn"], grid_sampled(arguments), grad_output)
    with rk.backend(backend):
        results = outcome(rk.ms_deform_attn, arguments, grad_output)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equal_counts_are_the_unpacked_form(dtype, backend):
    arguments = ms_deform_attn_arguments(dtype=dtype, points=3)
    packed = converted(arguments, dtype) | {"points": (3, 3, 3)}
    for name in ("sampling_locations", "attention_weights"):
        packed[name] = packed[name].detach().flatten(3, 4).requires_grad_()
    grad_output = torch.randn(2, 9, 16)
    with rk.backend(backend):
        results, expected = (outcome(rk.ms_deform_attn, given, grad_output) for given in (packed, arguments))
    for name, tensor in expected.items():
        assert torch.equal(results[name].view(tensor.shape), tensor), name


def test_gradcheck():
    arguments = ms_deform_attn_arguments(dtype=torch.float64, counts=(2, 0, 1), queries=3, channels=3, batch=1, seed=1)
    names = ("value", "sampling_locations", "attention_weights")

    def sample(*tensors):
        return rk.ms_deform_attn(**arguments | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(sample, tuple(arguments[name] for name in names))


@pytest.mark.parametrize("points", [[3, 1, 2], torch.tensor([3, 1, 2]), torch.tensor([3, 1, 2], dtype=torch.int32)])
def test_forms_of_points(points):
    arguments = ms_deform_attn_arguments(counts=(3, 1, 2))
    assert torch.equal(rk.ms_deform_attn(**arguments | {"points": points}), rk.ms_deform_attn(**arguments))


@pytest.mark.parametrize("layout", ["heads first", "points apart"])
def test_views(layout):
    arguments = ms_deform_attn_arguments(counts=(3, 1, 2))
    grad_output = torch.randn(2, 9, 16)
    expected = outcome(rk.ms_deform_attn, arguments, grad_output)
    for name in ("sampling_locations", "attention_weights"):
        tensor = arguments[name].detach()
        view = (
            tensor.transpose(1, 2).contiguous().transpose(1, 2)
            if layout == "heads first"
            else tensor.repeat_interleave(2, dim=3)[:, :, :, ::2]
        )
        assert not view.is_contiguous()
        arguments[name] = view.requires_grad_()
    for name, tensor in outcome(rk.ms_deform_attn, arguments, grad_output).items():
        assert torch.equal(tensor, expected[name]), name


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 7)), min_size=1, max_size=5),
    channels=st.integers(1, 20),
    queries=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_native_equals_reference(levels, channels, queries, seed):
    arguments = ms_deform_attn_arguments(
        levels=tuple(size for *size, _ in levels), counts=tuple(count for *_, count in levels),
        channels=channels, queries=queries, dtype=torch.float64, seed=seed,
    )  # fmt: skip
    grad_output = torch.randn(2, queries, 2 * channels, dtype=torch.float64)
    results = outcome(rk.ms_deform_attn, arguments, grad_output)
    with rk.backend("reference"):
        expected = outcome(rk.ms_deform_attn, arguments, grad_output)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=1e-11, atol=1e-11, msg=name)
