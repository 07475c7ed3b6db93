"""Checks of an op on a GPU, as functions of a device: test_gpu.py runs them there, test_gpu_checks.py on a CPU.

A function under test takes an op's arguments by name and gives its output; `results_of` adds the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import timing
from benchmarks.measure import Results, complaint, yardstick
from route_kernels.testing import EAGER, Arguments, call, declaration, map_tensors, named_tensors, outcome

Function = Callable[..., Tensor]
TWO_31 = 2**31
SUMMED_BY_ATOMICS = {("ms_deform_attn", "grad value"), ("ms_deform_attn_fused", "grad value")}
"""(op, result) that need not be bitwise the same twice, except under torch.use_deterministic_algorithms(True)."""


def public(op: str) -> Function:
    """The public op as a function under test."""
    return lambda **arguments: call(op, arguments)


def output_dtype_under_autocast(op: str, dtype: torch.dtype) -> torch.dtype:
    """The output's dtype from float32 inputs; `dtype` is that of autocast."""
    return torch.float32 if getattr(declaration(op), "FLOAT32_UNDER_AUTOCAST", False) else dtype


def placed(arguments: Arguments, device: torch.device | str) -> Arguments:
    """New leaves with the same values on `device`."""
    return map_tensors(arguments, lambda x: x.detach().to(device, copy=True).requires_grad_(x.requires_grad))


def grad_output_for(function: Function, arguments: Arguments) -> Tensor:
    """Normal, the same for the same shape."""
    with torch.no_grad():
        output = function(**arguments)
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def results_of(function: Function, arguments: Arguments, grad_output: Tensor | None = None) -> Results:
    """{"output": ..., "grad NAME": ...}."""
    return outcome(function, arguments, grad_output_for(function, arguments) if grad_output is None else grad_output)


def assert_equal(found: Results, expected: Results, loosely: Iterable[str] = ()) -> None:
    """Bitwise, but for the results named in `loosely`: those to 1e-4 (float16, bfloat16: 2e-2) of the largest entry."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].device == tensor.device, name
        if name not in loosely:
            assert torch.equal(found[name], tensor), f"{name}: differs bitwise"
        elif tensor.numel():
            allowed = (2e-2 if tensor.element_size() == 2 else 1e-4) * tensor.abs().max().item()
            difference = (found[name] - tensor).abs().max().item()
            assert difference <= allowed, f"{name}: differs by {difference:.3g}, allowed {allowed:.3g}"


def assert_accurate(op: str, found: Results, arguments: Arguments, grad_output: Tensor) -> None:
    """By the tolerance policy, against the op's formula in float64."""
    wrong = complaint(found, *yardstick(EAGER[op], arguments, grad_output))
    assert wrong is None, wrong


def loose_results(op: str) -> set[str]:
    return {name for each, name in SUMMED_BY_ATOMICS if each == op}


def check_same_twice(op: str, function: Function, arguments: Arguments) -> None:
    """Bitwise the same results in several runs, but for sums by atomics."""
    first = results_of(function, arguments)
    for _ in range(3):
        assert_equal(results_of(function, arguments), first, loose_results(op))


def check_deterministic_mode(op: str, function: Function, arguments: Arguments) -> None:
    """In PyTorch's deterministic mode every result is bitwise the same twice, and right; `empty` gives NaN there."""
    grad_output = grad_output_for(function, arguments)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results_of(function, arguments, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(second, first)
    assert_accurate(op, first, arguments, grad_output)


def check_compiled(
    op: str, function: Function, arguments_of: Callable[[int], Arguments], backend: str = "inductor"
) -> None:
    """One graph, compiled once, for any number of queries; results as uncompiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for queries in (33, 40, 57):
        arguments = arguments_of(queries)
        grad_output = grad_output_for(function, arguments)
        expected = results_of(function, arguments, grad_output)
        assert_equal(results_of(compiled, arguments, grad_output), expected, expected)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations)) == 1, f"compiled anew: {compilations}"


def check_autocast(op: str, function: Function, arguments: Arguments, dtype: torch.dtype) -> None:
    """float32 arguments under autocast: output in `dtype`, or float32 of ops that autocast keeps so; gradients too."""
    device = next(tensor.device for _, tensor in named_tensors(arguments))
    grad_output = grad_output_for(function, arguments)
    expected = results_of(function, arguments, grad_output)
    with torch.autocast(device.type, dtype):
        results = results_of(function, arguments, grad_output)
    assert results["output"].dtype == output_dtype_under_autocast(op, dtype)
    for name, tensor in expected.items():
        assert name == "output" or results[name].dtype == torch.float32, name
        torch.testing.assert_close(results[name].float(), tensor, rtol=0.1, atol=0.1, msg=name)


# ---- sizes ---------------------------------------------------------------------------------------------------------


def beyond_32_bits(arguments: Arguments) -> Arguments:
    """The same values, images 2^31 elements apart: every floating tensor with 2 images is a view of one huge buffer."""
    tensors = [tensor for _, tensor in named_tensors(arguments) if _is_spread(tensor)]
    (dtype,) = {tensor.dtype for tensor in tensors}
    in_image = sum(tensor[0].numel() for tensor in tensors)
    stride = TWO_31 + in_image
    buffer = torch.empty(stride + in_image, dtype=dtype, device=tensors[0].device)
    start = 0

    def spread(tensor: Tensor) -> Tensor:
        nonlocal start
        if not _is_spread(tensor):
            return tensor
        inner = torch.empty(tensor.shape[1:], device="meta").stride()
        view = buffer.as_strided(tensor.shape, (stride, *inner), start)
        start += tensor[0].numel()
        return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    with torch.no_grad():
        return map_tensors(arguments, lambda tensor: spread(tensor).detach().requires_grad_(tensor.requires_grad))


def _is_spread(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[0] == 2


def check_beyond_32_bits(op: str, function: Function, arguments: Arguments) -> None:
    """Addresses are 64-bit: images 2^31 elements apart give what they give side by side."""
    spread = beyond_32_bits(arguments)
    grad_output = grad_output_for(function, arguments)
    assert any(tensor.stride(0) > TWO_31 for _, tensor in named_tensors(spread))
    expected = results_of(function, arguments, grad_output)
    assert_equal(results_of(function, spread, grad_output), expected, loose_results(op))


def check_many_images(op: str, function: Function, arguments: Arguments) -> None:
    """The first and the last images of a batch too large to verify whole are right, their gradients too."""
    grad_output = grad_output_for(function, arguments)
    found = results_of(function, arguments, grad_output)
    images = next(tensor.shape[0] for _, tensor in named_tensors(arguments))
    for start in (0, max(0, images - 2)):
        few = slice(start, start + 2)

        def of_few(x: Tensor, few: slice = few) -> Tensor:
            x_of_few = x.detach()[few] if x.shape[0] == images else x.detach()
            return x_of_few.clone().requires_grad_(x.requires_grad and x.shape[0] == images)

        given = {name: x[few] if isinstance(x, list) and len(x) == images else x for name, x in arguments.items()}
        found_of_few = {name: tensor[few] for name, tensor in found.items() if tensor.shape[0] == images}
        assert_accurate(op, found_of_few, map_tensors(given, of_few), grad_output[few])


def peak_beside_inputs(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run` holds at a time beside what is there already."""
    if device.type == "cuda":
        return timing.peak_beside_inputs(run, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def check_memory(
    op: str, function: Function, arguments_of: Callable[[int], Arguments], device: torch.device, sizes: Sequence[int]
) -> None:
    """Forward + backward hold at most twice as much for twice as many queries, and never a byte for each pair."""
    peaks = []
    for queries in sizes:
        arguments = arguments_of(queries)
        grad_output = grad_output_for(function, arguments)
        results_of(function, arguments, grad_output)  # whatever is set up once
        peaks.append(peak_beside_inputs(partial(outcome, function, arguments, grad_output), device))
    assert_linear(sizes, peaks)
    assert peaks[-1] < sizes[-1] ** 2, f"{op}: {peaks[-1]} bytes at {sizes[-1]} queries"


def assert_linear(sizes: Sequence[int], peaks: Sequence[int]) -> None:
    """Growth from size to size is at most proportional, with a twentieth to spare for rounded tiles."""
    for (small, at_small), (large, at_large) in pairwise(zip(sizes, peaks, strict=True)):
        allowed = 1.05 * at_small * large / small
        assert 0 < at_large <= allowed, (
            f"{at_large} bytes at {large}, {at_small} at {small}: expected at most {allowed:.0f}"
        )


# ---- CUDA alone ----------------------------------------------------------------------------------------------------


def check_no_synchronisation(function: Function, arguments: Arguments) -> None:
    """Neither pass waits for the GPU."""
    grad_output = grad_output_for(function, arguments)
    results_of(function, arguments, grad_output)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(function, arguments, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def overwrite(arguments: Arguments, others: Arguments) -> None:
    """In place, the values of `others`."""
    with torch.no_grad():
        for (_, tensor), (_, other) in zip(named_tensors(arguments), named_tensors(others), strict=True):
            tensor.copy_(other)


def check_graph_replay(op: str, function: Function, arguments: Arguments, others: Sequence[Arguments]) -> None:
    """Forward and backward captured once give, replayed, the results of whatever the arguments then hold."""
    grad_output = grad_output_for(function, arguments)
    device = grad_output.device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            outcome(function, arguments, grad_output)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(function, arguments, grad_output)
    for other in others:
        overwrite(arguments, other)
        graph.replay()
        torch.cuda.synchronize(device)
        assert_equal(captured, results_of(function, other, grad_output), loose_results(op))


def check_stream(op: str, function: Function, arguments: Arguments) -> None:
    """Work of a stream of one's own follows what was queued there before it."""
    grad_output = grad_output_for(function, arguments)
    device = grad_output.device
    expected = results_of(function, arguments, grad_output)
    late = map_tensors(arguments, lambda x: torch.zeros_like(x, requires_grad=x.requires_grad))
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clocks: the arguments arrive long after the kernels are queued
        overwrite(late, arguments)
        found = outcome(function, late, grad_output)
    stream.synchronize()
    assert_equal(found, expected, loose_results(op))
