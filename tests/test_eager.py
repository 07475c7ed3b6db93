"""Backend `eager`: the numbers of the reference, kept and computed as PyTorch does it."""

import pytest
import torch
from saved_tensors import kept_bytes
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import route_kernels as rk
from route_kernels.backends import OPS, PRODUCTS
from route_kernels.nn import FeedForward, MSDeformAttn, RoutedSelfAttention
from route_kernels.testing import call, converted, named_tensors, outcome, sample_arguments

SAMPLES = [(op, label) for op in (*OPS, *PRODUCTS) for label in sample_arguments(op)]
EVERY_OP = [(op, next(iter(sample_arguments(op)))) for op in (*OPS, *PRODUCTS)]


def doubles(op, label):
    return converted(sample_arguments(op)[label], torch.float64)


def outcome_on(backend, op, arguments):
    with rk.backend(backend):
        output = call(op, arguments)
        torch.manual_seed(0)
        return outcome(lambda **given: call(op, given), arguments, torch.randn(output.shape, dtype=output.dtype))


@pytest.mark.parametrize("op, label", SAMPLES)
def test_the_numbers_of_the_reference(op, label):
    arguments = doubles(op, label)
    ours, exact = outcome_on("eager", op, arguments), outcome_on("reference", op, arguments)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("op, label", EVERY_OP)
def test_it_runs_on_request_alone(op, label):
    arguments = sample_arguments(op)[label]
    tensors = [tensor for _, tensor in named_tensors(arguments)]
    if op in OPS:
        assert rk.can_run(op, "eager", *tensors)[0]
        assert rk.backends.choose(op, *tensors) != "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op, label", EVERY_OP)
def test_dtypes_and_shapes_are_those_of_the_op(op, label, dtype):
    arguments = converted(sample_arguments(op)[label], dtype)
    ours, expected = (outcome_on(backend, op, arguments) for backend in ("eager", "reference"))
    assert {name: (x.dtype, x.shape) for name, x in ours.items()} == {
        name: (x.dtype, x.shape) for name, x in expected.items()
    }


@pytest.mark.parametrize("op, label", EVERY_OP)
def test_autocast_is_pytorchs(op, label):
    arguments = converted(sample_arguments(op)[label], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (outcome_on(backend, op, arguments) for backend in ("eager", "reference"))
    for name, exact in expected.items():
        assert ours[name].dtype == exact.dtype
        torch.testing.assert_close(ours[name].float(), exact.float(), rtol=0.05, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("op, label", EVERY_OP)
def test_one_graph_of_pytorchs_operators(op, label):
    torch._dynamo.reset()  # graphs of other samples count towards its limit
    arguments = sample_arguments(op)[label]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda arguments: call(op, arguments), backend=counter, fullgraph=True)
    with rk.backend("eager"):
        torch.testing.assert_close(compiled(arguments), call(op, arguments))
    assert counter.frame_count == 1
    assert not any("route_kernels" in str(node.target) for node in counter.graphs[0].graph.nodes)


@pytest.mark.parametrize("op, label", [pair for pair in EVERY_OP if pair[0] in ("feed_forward", "add_layer_norm")])
def test_second_derivatives_where_pytorch_has_them(op, label):
    arguments = doubles(op, label)
    x = arguments.pop("x")[..., :3, :].detach().requires_grad_()
    if "residual" in arguments:
        arguments["residual"] = arguments["residual"][..., :3, :]
    with rk.backend("eager"):
        assert gradcheck(lambda x: torch.autograd.grad(call(op, {"x": x} | arguments).square().sum(), x,
                                                       create_graph=True)[0], x)  # fmt: skip


def modules():
    x, boxes = torch.randn(2, 53, 16), torch.rand(2, 53, 1, 4)
    levels = ((5, 7), (3, 6))
    yield FeedForward(16, 64), FeedForward(16, 64, chunks=None), (x,)
    yield RoutedSelfAttention(16, 2, recompute=True), RoutedSelfAttention(16, 2), (x, torch.randn(2, 53, 16))
    yield MSDeformAttn(16, 2, 2, 2, recompute=True), MSDeformAttn(16, 2, 2, 2), (x, boxes, x, levels, None, x)


@pytest.mark.parametrize("lever, plain, inputs", list(modules()), ids=lambda x: type(x).__name__)
def test_modules_keep_what_pytorch_keeps(lever, plain, inputs):
    lever.load_state_dict(plain.state_dict())
    kept = {}
    with rk.backend("eager"):
        for name, module in (("lever", lever), ("plain", plain)):
            kept[name] = kept_bytes(lambda module=module: module(*inputs), but=list(module.parameters()))
        torch.testing.assert_close(lever(*inputs), plain(*inputs), rtol=0, atol=0)
    assert kept["lever"] == kept["plain"]


def test_strength_and_limit_may_be_tensors():
    arguments = doubles("routed_attention", "routed")
    found = {}
    for backend in ("eager", "reference"):
        strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        routing = arguments["routing"]._replace(strength=strength, limit=torch.tensor(0.7, dtype=torch.float64))
        with rk.backend(backend):
            output = call("routed_attention", {**arguments, "routing": routing})
        found[backend] = output, *torch.autograd.grad(output.square().sum(), [arguments["query"], strength])
    for ours, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert found["eager"][-1] != 0


def test_a_block_inside_a_compiled_function():
    def similarity(x):
        with rk.backend("eager"):
            return rk.query_similarity(x)

    x = torch.randn(2, 5, 4)
    counter = CompileCounterWithBackend("eager")
    found = torch.compile(similarity, backend=counter, fullgraph=True)(x)
    torch.testing.assert_close(found, similarity(x))
    assert not any("route_kernels" in str(node.target) for node in counter.graphs[0].graph.nodes)
    assert rk.requested_backend() is None
