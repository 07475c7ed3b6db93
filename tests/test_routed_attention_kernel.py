"""Promises of the native kernel alone: every element written, O(N) memory, one result however often it is computed."""

import math

import pytest
import torch

import route_kernels as rk
from route_kernels import native
from route_kernels.testing import named_tensors, outcome, routed_attention_arguments

pytestmark = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))


GUARD = 64  # elements before and after a buffer


def guarded(shape, dtype):
    """A NaN-filled buffer and a contiguous view of its middle."""
    count = math.prod(shape)
    buffer = torch.full((count + 2 * GUARD,), math.nan, dtype=dtype)
    return buffer, buffer[GUARD : GUARD + count].view(shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [dict(queries=33, keys=257), dict(queries=1, keys=1), dict(queries=5, keys=0), dict(queries=0, keys=5)],
    ids=str,
)
@pytest.mark.parametrize("routed", [True, False], ids=["routed", "plain"])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_element_of_poisoned_outputs_is_written_and_nothing_beside(sizes, routed, dtype, threads):
    torch.set_num_threads(threads)
    arguments = routed_attention_arguments(channels=7, rank=3, routed=routed, dtype=dtype, **sizes)
    grad_output = torch.randn(arguments["query"].shape).to(dtype)
    expected = outcome(rk.routed_attention, arguments, grad_output)

    tensors = [tensor.detach() for _, tensor in named_tensors(arguments)]
    inputs = (tensors[:3], tensors[3:], None, None, (1 / math.sqrt(7), 1.0, 5.0))
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse_buffer, lse = guarded(tensors[0].shape[:3], lse_dtype)
    buffers, outputs = zip(*(guarded(tensor.shape, dtype) for tensor in (tensors[0], *tensors)), strict=True)
    output, *grads = outputs
    kernels = torch.ops.route_kernels_native
    kernels.routed_attention_forward(*inputs, [output, lse])
    kernels.routed_attention_backward(grad_output, [output, lse], *inputs, grads)
    assert not lse.isnan().any()
    for (name, wanted), written in zip(expected.items(), outputs, strict=True):
        assert torch.equal(written, wanted), name  # NaN equals nothing
    for buffer in (lse_buffer, *buffers):
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


@pytest.mark.parametrize("routed", [True, False], ids=["routed", "plain"])
def test_backward_keeps_inputs_output_and_lse_and_nothing_else(routed):
    arguments = routed_attention_arguments(routed=routed)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = rk.routed_attention(**arguments)
    inputs = {tensor.data_ptr() for _, tensor in named_tensors(arguments)}
    beyond = [tensor for tensor in kept if tensor.data_ptr() not in inputs | {output.data_ptr()}]
    assert [tensor.shape for tensor in beyond] == [output.shape[:3]]  # lse
    assert len(kept) == len(inputs) + 2


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_lse_is_a_natural_logarithm_on_every_backend(backend):
    arguments = routed_attention_arguments(routed=False)
    kept = []
    with (
        rk.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        output = rk.routed_attention(**arguments)
    (lse,) = (tensor for tensor in kept if tensor.shape == output.shape[:3])
    query, key = arguments["query"].detach(), arguments["key"].detach()
    expected = torch.logsumexp(query @ key.mT / math.sqrt(query.shape[-1]), dim=-1)
    torch.testing.assert_close(lse, expected)


def test_nothing_of_queries_times_keys_is_allocated():
    queries, masks = 4096, {"key_ranges": torch.tensor([[0, 4096], [0, 0]], dtype=torch.int32).repeat(4096, 1, 1)}
    arguments = routed_attention_arguments(batch=1, heads=1, queries=queries, channels=4, rank=2, gate_rank=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        outcome(rk.routed_attention, {**arguments, **masks}, torch.ones_like(arguments["query"]))
    allocations = [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::")]
    inputs = sum(tensor.nbytes for _, tensor in named_tensors(arguments))
    assert max(allocations) > inputs / 2, "the profiler saw no allocation of the kernel"
    assert max(allocations) < queries * queries / 2  # bytes: half a bool [N, M]


@pytest.mark.parametrize("sizes", [dict(batch=1, queries=300), dict(batch=3, queries=20, keys=700)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_agree_and_repeat_bit_for_bit(threads, sizes):
    arguments = routed_attention_arguments(**sizes)
    grad_output = torch.randn(arguments["query"].shape)
    alone = outcome(rk.routed_attention, arguments, grad_output)
    torch.set_num_threads(threads)
    together = outcome(rk.routed_attention, arguments, grad_output)
    for name, result in outcome(rk.routed_attention, arguments, grad_output).items():
        assert torch.equal(result, together[name]), name
        torch.testing.assert_close(result, alone[name], rtol=1e-5, atol=1e-5)
