"""Promises of deformable attention's native kernels alone: every element written, little memory, repeatability."""

import math

import pytest
import torch

import route_kernels as rk
from route_kernels import native
from route_kernels.testing import (
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    named_tensors,
    outcome,
)

pytestmark = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))

ARGUMENTS = {"ms_deform_attn": ms_deform_attn_arguments, "ms_deform_attn_fused": ms_deform_attn_fused_arguments}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_op = pytest.mark.parametrize("op", ARGUMENTS)
kernels = torch.ops.route_kernels_native


def gradient_for(arguments, seed=1):
    value, points = arguments["value"], arguments.get("attention_weights", arguments.get("attention_logits"))
    shape = (value.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)


def poisoned(tensor):
    return torch.full_like(tensor, math.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [dict(channels=7), dict(channels=16, queries=50), dict(queries=0), dict(points=0)])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_element_of_poisoned_outputs_is_written(sizes, dtype, threads):
    torch.set_num_threads(threads)
    arguments = ms_deform_attn_arguments(levels=((5, 7), (3, 4)), dtype=dtype, **sizes)
    grad_output = gradient_for(arguments)
    expected = list(outcome(rk.ms_deform_attn, arguments, grad_output).values())
    value, locations, weights = (tensor.detach() for _, tensor in named_tensors(arguments))
    levels = [5, 7, 3, 4, 0, 35, weights.shape[4], weights.shape[4]]
    inputs = (value, levels, locations.flatten(3, 4), weights.flatten(3, 4))
    output, grads = poisoned(grad_output), [poisoned(tensor) for tensor in (value, locations, weights)]
    kernels.ms_deform_attn_forward(*inputs, output)
    of_points = [grad.flatten(3, 4) for grad in grads[1:]]
    kernels.ms_deform_attn_backward(grad_output, *inputs, False, [grads[0], *of_points])
    for written, wanted in zip((output, *grads), expected, strict=True):
        assert torch.equal(written, wanted)  # NaN equals nothing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [dict(channels=7), dict(channels=16, queries=50), dict(queries=0), dict(points=0)])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_element_of_poisoned_outputs_of_the_fused_kernel_is_written(sizes, coordinates, dtype, threads):
    torch.set_num_threads(threads)
    arguments = ms_deform_attn_fused_arguments(
        levels=((5, 7), (3, 4)), coordinates=coordinates, masked=True, dtype=dtype, **sizes
    )
    grad_output = gradient_for(arguments)
    expected = list(outcome(rk.ms_deform_attn_fused, arguments, grad_output).values())
    value, references, offsets, logits, mask = (tensor.detach() for _, tensor in named_tensors(arguments))
    points = logits.shape[3] // 2
    inputs = (value, [5, 7, 3, 4, 0, 35, points, points], references, offsets, logits, mask)
    output, grads = poisoned(grad_output), [poisoned(tensor) for tensor in (value, references, offsets, logits)]
    kernels.ms_deform_attn_fused_forward(*inputs, output)
    kernels.ms_deform_attn_fused_backward(grad_output, *inputs, False, [grads[i] for i in (0, 2, 3, 1)])
    for written, wanted in zip((output, *grads), expected, strict=True):
        assert torch.equal(written, wanted)
    without = [poisoned(tensor) for tensor in (value, offsets, logits)]
    kernels.ms_deform_attn_fused_backward(grad_output, *inputs, False, without)
    for written, wanted in zip(without, (expected[1], *expected[3:]), strict=True):
        assert torch.equal(written, wanted)


# ---- threads ---------------------------------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize(
    "sizes",
    [dict(batch=1, heads=1), dict(batch=1, heads=8), dict(batch=2, heads=3), dict(batch=1, heads=2, queries=9)],
    ids=str,
)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_agree_and_repeat_bit_for_bit(op, threads, sizes):
    arguments = ARGUMENTS[op](**{"channels": 16, "queries": 150, "points": 3, **sizes})
    grad_output = gradient_for(arguments)
    alone = outcome(getattr(rk, op), arguments, grad_output)
    torch.set_num_threads(threads)
    together, again = (outcome(getattr(rk, op), arguments, grad_output) for _ in range(2))
    for name, result in together.items():
        assert torch.equal(again[name], result), name
        if name == "grad value":  # queries that several threads share are summed in another order
            torch.testing.assert_close(result, alone[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(result, alone[name]), name


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [5, 32])
def test_a_query_does_not_depend_on_its_company(op, channels, dtype):
    """Few queries read value where it is, many read a head's rows packed; the numbers are the same."""
    arguments = ARGUMENTS[op](channels=channels, queries=60, points=4, levels=((9, 8), (4, 4)), dtype=dtype)
    together = outcome(getattr(rk, op), arguments, gradient_for(arguments))
    one = slice(17, 18)
    alone = {
        name: argument.detach()[:, one].requires_grad_() if isinstance(argument, torch.Tensor) else argument
        for name, argument in arguments.items()
    }
    alone["value"] = arguments["value"]
    for name, result in outcome(getattr(rk, op), alone, gradient_for(arguments)[:, one]).items():
        if name != "grad value":
            assert torch.equal(result, together[name][:, one]), name


# ---- memory ----------------------------------------------------------------------------------------------------------


@each_op
def test_backward_keeps_the_inputs_and_nothing_else(op):
    options = {"masked": True} if op == "ms_deform_attn_fused" else {}
    arguments = ARGUMENTS[op](**options)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        getattr(rk, op)(**arguments)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for _, tensor in named_tensors(arguments)}


def largest_allocation(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", ["queries last", "heads first"])
def test_no_copy_of_value(op, dtype, layout):
    arguments = ARGUMENTS[op](levels=((64, 64),), heads=8, channels=32, queries=2000, points=2, batch=1, dtype=dtype)
    value = arguments["value"].detach()
    arguments["value"] = value.transpose(1, 2).contiguous().transpose(1, 2) if layout == "heads first" else value
    with torch.no_grad():
        used = largest_allocation(lambda: getattr(rk, op)(**arguments))
    output = 2000 * 8 * 32 * dtype.itemsize
    assert output <= used < value.nbytes, "the profiler sees the output, and nothing as large as value"


def test_the_gradient_of_references_is_computed_where_asked_for_only():
    arguments = ms_deform_attn_fused_arguments()
    asked = outcome(rk.ms_deform_attn_fused, arguments, gradient_for(arguments))
    arguments["reference_points"] = arguments["reference_points"].detach()
    seen = []
    backward = torch.ops.route_kernels.ms_deform_attn_fused_backward.default

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is backward:
                seen.append(len(result))
            return result

    with Record():
        unasked = outcome(rk.ms_deform_attn_fused, arguments, gradient_for(arguments))
    assert seen == [3]
    assert set(asked) - set(unasked) == {"grad reference_points"}
    assert all(torch.equal(tensor, asked[name]) for name, tensor in unasked.items())
