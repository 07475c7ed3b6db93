"""Every bad input gives its one error, in eager, on the reference backend, on fake tensors and compiled."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import route_kernels as rk
from route_kernels import RoutingFactors
from route_kernels.backends import OPS, PRODUCTS
from route_kernels.testing import BAD_INPUTS, call, map_tensors, routed_attention_arguments

NAMES = [f"{bad.op} {bad.name}" for bad in BAD_INPUTS]
FIRST_OF_EACH_OP = [next(bad for bad in BAD_INPUTS if bad.op == op and "dimensions" in bad.name) for op in OPS[:3]]


def test_every_op_has_bad_inputs():
    assert {bad.op for bad in BAD_INPUTS} == {*OPS, *PRODUCTS}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bad", BAD_INPUTS, ids=NAMES)
def test_real(bad, backend):
    with rk.backend(backend), pytest.raises(bad.error, match=bad.message):
        call(bad.op, bad.arguments())


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=NAMES)
def test_fake_gives_the_same_message(bad):
    with pytest.raises(bad.error) as real:
        call(bad.op, bad.arguments())
    mode = FakeTensorMode()
    fakes = map_tensors(bad.arguments(), mode.from_tensor)
    with mode, pytest.raises(bad.error) as fake:
        call(bad.op, fakes)
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("bad", FIRST_OF_EACH_OP, ids=OPS[:3])
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
