"""Every bad input gives its one error, in eager, on the reference backend, on fake tensors and compiled."""

import re

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import route_kernels as rk
from route_kernels import RoutingFactors
from route_kernels.backends import OPS, PRODUCTS
from route_kernels.testing import (
    BAD_INPUTS,
    call,
    declaration,
    map_tensors,
    named_tensors,
    routed_attention_arguments,
    sample_arguments,
)

NAMES = [f"{bad.op} {bad.name}" for bad in BAD_INPUTS]
OF_DIMENSIONS = [bad for bad in BAD_INPUTS if "dimension" in bad.name]


def test_every_op_has_bad_inputs():
    assert {bad.op for bad in BAD_INPUTS} == {*OPS, *PRODUCTS}


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@pytest.mark.parametrize("bad", BAD_INPUTS, ids=NAMES)
def test_real(bad, backend):
    error, message, arguments = bad.error, bad.message, bad.arguments()
    if backend == "triton" and bad.op in OPS:
        judged = [tensor for name, tensor in named_tensors(arguments) if name != "attn_mask"]
        runs, reason = rk.can_run(bad.op, backend, *judged)
        if not runs:
            error, message = rk.BackendUnavailableError, re.escape(reason)
    with rk.backend(backend), pytest.raises(error, match=message):
        call(bad.op, arguments)


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=NAMES)
def test_fake_gives_the_same_message(bad):
    with pytest.raises(bad.error) as real:
        call(bad.op, bad.arguments())
    mode = FakeTensorMode()
    fakes = map_tensors(bad.arguments(), mode.from_tensor)
    with mode, pytest.raises(bad.error) as fake:
        call(bad.op, fakes)
    assert str(fake.value) == str(real.value)


NUMBERS = [
    (op, argument, number)
    for op in (*OPS, *PRODUCTS)
    for argument, number in getattr(declaration(op), "NUMBERS", {}).items()
]


def test_there_are_numbers():
    assert len(NUMBERS) >= 5 and len({op for op, _, _ in NUMBERS}) >= 3


@pytest.mark.parametrize("backend", [None, "reference", "compiled"])
@pytest.mark.parametrize("op, argument, number", NUMBERS)
def test_a_tensor_of_no_dimensions_is_a_number(op, argument, number, backend):
    name, _, field = argument.partition(".")
    function = lambda arguments: call(op, arguments)  # noqa: E731
    if backend == "compiled":
        torch._dynamo.reset()
        backend, function = None, torch.compile(function, backend="eager")  # breaks the graph where a tensor is read
    results = []
    for value in (number, torch.tensor(number), np.float32(number)):
        arguments = next(iter(sample_arguments(op).values()))
        arguments[name] = arguments[name]._replace(**{field: value}) if field else value
        with rk.backend(backend):
            results.append(function(arguments))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], call(op, next(iter(sample_arguments(op).values()))))


def test_a_number_with_a_tangent_is_an_error():
    arguments = next(iter(sample_arguments("routed_attention").values()))
    one = torch.ones([])
    with pytest.raises(TypeError, match=r"^routed_attention: scale: expected no gradient"):
        torch.func.jvp(lambda scale: rk.routed_attention(**arguments, scale=scale), (one,), (one,))


@pytest.mark.parametrize("kept", [("routed_atention",), "routed_attention", ("routed_attention", None), ["linear"]])
def test_recomputed_names_what_it_does_not_know(kept):
    with pytest.raises(ValueError, match=r"^recomputed: kept: expected names out of .*routed_attention, .*linear, got"):
        rk.recomputed(torch.relu, torch.ones(2, requires_grad=True), kept=kept)


@pytest.mark.parametrize("bad", OF_DIMENSIONS, ids=[f"{bad.op} {bad.name}" for bad in OF_DIMENSIONS])
def test_compiled_gives_the_same_message(bad):
    torch._dynamo.reset()
    compiled = torch.compile(lambda arguments: call(bad.op, arguments), backend="eager", fullgraph=True)
    with pytest.raises(Exception) as caught:
        compiled(bad.arguments())
    assert re.search(bad.message.removeprefix("^"), str(caught.value))


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=NAMES)
def test_messages_name_op_argument_expectation_and_arrival(bad):
    with pytest.raises(bad.error) as caught:
        call(bad.op, bad.arguments())
    message = str(caught.value)
    assert message.startswith(f"{bad.op}: ") and "expected" in message and "\n" not in message
    assert "got" in message or bad.name.startswith("attn_mask: learnable")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", [*OPS, *PRODUCTS])
def test_a_sparse_tensor_is_named(op, backend):
    arguments = next(iter(sample_arguments(op).values()))
    for name in [name for name, argument in arguments.items() if isinstance(argument, torch.Tensor)]:
        sparse = {**arguments, name: arguments[name].detach().to_sparse()}
        with rk.backend(backend), pytest.raises(TypeError, match=f"^{op}: {name}: expected a tensor with strides, got"):
            call(op, sparse)


def test_routing_bias_has_the_contract_of_the_op():
    routing = routed_attention_arguments(queries=5, keys=7)["routing"]
    with pytest.raises(TypeError, match=r"^routing_bias: routing: expected RoutingFactors, got tuple"):
        rk.routing_bias(tuple(routing))
    with pytest.raises(ValueError, match=r"^routing_bias: routing.sup_k: expected shape \[B=2, M=6, R=4\], got"):
        rk.routing_bias(RoutingFactors(**{**routing._asdict(), "sup_k": routing.sup_k[:, :-1, :-1]}))
    with pytest.raises(ValueError, match=r"^routing_bias: routing.gate_q: expected shape \[B=2, N=5, G\], got"):
        rk.routing_bias(routing._replace(gate_q=routing.gate_q[:, 1:]))
    with pytest.raises(TypeError, match=r"^routing_bias: routing.sup_q: expected a tensor, got NoneType"):
        rk.routing_bias(routing._replace(sup_q=None))
