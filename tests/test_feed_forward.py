"""feed_forward and add_linear: ops of PyTorch's own products that keep neither the hidden layer nor the sum."""

import pytest
import torch
from gpu_checks import peak_beside_inputs
from saved_tensors import kept_bytes
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import route_kernels as rk
from route_kernels.nn import FeedForward
from route_kernels.testing import (
    EAGER,
    add_linear_arguments,
    call,
    errors,
    feed_forward_arguments,
    named_tensors,
    outcome,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_chunks_cost_weight_gradients_no_accuracy(dtype):
    """Over chunks sums are float32: with 32 of them the error is not above that of one product in the dtype."""
    sizes = dict(batch=1, queries=4096, channels=16, hidden=32)
    exact = feed_forward_arguments(dtype=dtype, chunks=32, **sizes)
    doubles = {name: value.detach().double().requires_grad_() if isinstance(value, torch.Tensor) else value
               for name, value in exact.items()}  # fmt: skip
    grad_output = torch.randn(1, 4096, 16).to(dtype)
    ours, eager = (outcome(function, exact, grad_output) for function in (rk.feed_forward, EAGER["feed_forward"]))
    reference = outcome(EAGER["feed_forward"], doubles, grad_output)
    for name, (error, allowed) in errors(ours, eager, reference).items():
        if name in ("grad w1", "grad w2"):
            assert error <= 0.6 * allowed, (name, error, allowed)  # `allowed` is twice eager's and more


def test_vectors():
    arguments = feed_forward_arguments()
    one = {**arguments, "x": arguments["x"][0, 0]}
    torch.testing.assert_close(rk.feed_forward(**one), call("feed_forward", arguments)[0, 0])


def test_the_hidden_layer_is_not_kept():
    arguments = feed_forward_arguments(batch=2, queries=100, channels=32, hidden=256)
    inputs = [tensor for _, tensor in named_tensors(arguments)]
    hidden = 2 * 100 * 256 * 4
    assert kept_bytes(lambda: call("feed_forward", arguments), but=inputs) == 0
    assert kept_bytes(lambda: EAGER["feed_forward"](**arguments), but=inputs) >= hidden


def test_neither_sum_nor_cast_is_kept():
    arguments = add_linear_arguments(batch=2, queries=100, channels=32)
    inputs = [tensor for _, tensor in named_tensors(arguments)]
    assert kept_bytes(lambda: EAGER["add_linear"](**arguments), but=inputs) == 2 * 100 * 32 * 4
    with torch.autocast("cpu", torch.bfloat16):
        for op, given in (("add_linear", arguments), ("feed_forward", feed_forward_arguments())):
            tensors = [tensor for _, tensor in named_tensors(given)]
            assert kept_bytes(lambda op=op, given=given: call(op, given), but=tensors) == 0


def step(run, tensors):
    output = run(*tensors)
    output.backward(torch.ones_like(output))


def tracked_peak(run, *sizes):
    mode, tracker = FakeTensorMode(), MemTracker()
    with mode, tracker:
        tensors = [torch.empty(size, requires_grad=True) for size in sizes]
        step(run, tensors)
    (peak,) = (snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
    return peak


def test_a_memory_tracker_of_fake_tensors_sees_the_workspace():
    """x, y, their gradients and two chunks of the hidden layer, and what belongs to the weights."""
    tokens, channels, hidden = 4096, 64, 512
    sizes = (tokens, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,)
    peak = {
        chunks: tracked_peak(lambda *tensors, chunks=chunks: rk.feed_forward(*tensors, "relu", chunks), *sizes)
        for chunks in (1, 4, 8)
    }
    assert peak[1] - peak[4] == 2 * tokens * hidden * 4 * 3 // 4
    assert peak[4] - peak[8] == 2 * tokens * hidden * 4 // 8
    plain = tracked_peak(lambda x, w1, b1, w2, b2: EAGER["feed_forward"](x, w1, b1, w2, b2), *sizes)
    assert peak[8] < plain / 2


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_nothing_beside_the_workspace_is_allocated(activation):
    arguments = feed_forward_arguments(batch=1, queries=4096, channels=64, hidden=512, activation=activation)
    tensors = [tensor for _, tensor in named_tensors(arguments)]
    inputs = sum(tensor.nbytes for tensor in tensors)

    def run(*tensors):
        return rk.feed_forward(*tensors, activation, 4)

    fake = tracked_peak(run, *(tensor.shape for tensor in tensors))
    real = peak_beside_inputs(lambda: step(run, tensors), torch.device("cpu"))
    assert abs(real + inputs - fake) < 16384  # sums over tokens, of a row each


@pytest.mark.parametrize(("tokens", "expected"), [(0, 1), (3, 1), (1500, 1), (2600, 3), (100_000, 8)])
def test_the_module_takes_no_parts_too_small_to_be_fast(monkeypatch, tokens, expected):
    monkeypatch.setattr("route_kernels.nn.feed_forward.feed_forward", lambda *arguments: arguments[-1])
    assert FeedForward(8, 16, chunks=8)(torch.empty(tokens, 8)) == expected


def test_the_compiled_module_is_one_graph_for_all_numbers_of_tokens():
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ours = FeedForward(8, 16)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counted)
    for tokens in (3, 2600, 20_000):
        x = torch.randn(2, tokens, 8)
        torch.testing.assert_close(compiled(x), ours(x))
    assert len(graphs) == 1


def test_the_module_is_a_sequential_of_linear_layers():
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    ours = FeedForward(8, 16, activation="gelu")
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 8)
    for chunks in (None, 1, 3):
        ours.chunks = chunks
        torch.testing.assert_close(ours(x), plain(x))
    with pytest.raises(ValueError, match="FeedForward: activation: expected one of relu, gelu, silu, got 'tanh'"):
        FeedForward(8, 16, "tanh")
    with pytest.raises(ValueError, match="FeedForward: chunks: expected a positive number, got 0"):
        FeedForward(8, 16, chunks=0)
