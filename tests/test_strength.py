"""Strength and limit of the routing bias: numbers, or tensors whose value no graph holds."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import route_kernels as rk
from route_kernels import native
from route_kernels.nn import QueryRouter
from route_kernels.testing import named_tensors, outcome, routed_attention_arguments

BACKENDS = ["reference", "eager", "cpu", "triton"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SMALL = dict(batch=2, heads=3, queries=19, keys=33, channels=5, rank=3, gate_rank=2)
GIVEN = {
    "strength": (0.7, None),
    "strength, limit a number": (0.7, 0.3),
    "both": (-1.3, torch.tensor(0.3)),
    "limit": (None, torch.tensor(0.3)),
    "no strength": (0.0, 0.3),
}


def skip_unless_it_runs(backend):
    runs, reason = rk.can_run("routed_attention", backend, torch.empty(0))
    if not runs:
        pytest.skip(reason)


def attended(arguments, strength, limit, backend=None):
    """The output and all gradients, of a strength that is a tensor as `grad strength`."""
    arguments = {**arguments, "routing": arguments["routing"]._replace(limit=limit, strength=strength)}
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(arguments["query"].shape, generator=generator, dtype=torch.float64)
    with rk.backend(backend):
        return outcome(rk.routed_attention, arguments, grad_output.to(arguments["query"].dtype))


def numbers(strength, limit):
    return 1.0 if strength is None else strength, limit.item() if isinstance(limit, torch.Tensor) else limit


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("strength, limit", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
def test_tensors_give_what_numbers_give_and_the_strength_a_gradient(strength, limit, masked, dtype, backend):
    skip_unless_it_runs(backend)
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("takes no float64")
    arguments = routed_attention_arguments(dtype=dtype, **SMALL)
    if masked:
        arguments["attn_mask"] = torch.rand(19, 33, generator=torch.Generator().manual_seed(2)) > 0.4
        arguments["attn_mask"][3] = False
    tensor = None if strength is None else torch.tensor(strength, dtype=dtype, requires_grad=True)
    found = attended(arguments, 1.0 if tensor is None else tensor, limit, backend)
    wide = attended(arguments, *numbers(strength, limit), "reference")
    assert ("grad routing.strength" in found) == (tensor is not None)
    if tensor is not None:
        of_reference = attended(arguments, tensor.detach().clone().requires_grad_(), limit, "reference")
        wide["grad routing.strength"] = of_reference["grad routing.strength"]
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for name, expected in wide.items():
        assert found[name].dtype == expected.dtype
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=name)


def test_the_gradient_of_the_strength_by_differences():
    arguments = routed_attention_arguments(dtype=torch.float64, **SMALL)
    weight = torch.randn(arguments["query"].shape, dtype=torch.float64)

    def loss(strength):
        routing = arguments["routing"]._replace(strength=strength, limit=torch.tensor(0.4))
        return (rk.routed_attention(**{**arguments, "routing": routing}) * weight).sum()

    strength = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, strength)
    torch.testing.assert_close(
        torch.func.grad(loss)(strength.detach()), torch.autograd.grad(loss(strength), strength)[0]
    )


@each_backend
def test_many_strengths_are_one_graph(backend):
    skip_unless_it_runs(backend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    arguments = routed_attention_arguments(**SMALL)
    compiled = torch.compile(lambda given: rk.routed_attention(**given), backend=counter, fullgraph=True)
    with rk.backend(backend):
        for step in range(4):
            scalars = dict(strength=torch.tensor(0.1 * step, requires_grad=True), limit=torch.tensor(1.0 + step))
            given = {**arguments, "routing": arguments["routing"]._replace(**scalars)}
            leaves = [x for _, x in named_tensors(given) if x.requires_grad]
            results = [
                torch.autograd.grad(f(given).sum(), leaves) for f in (compiled, lambda x: rk.routed_attention(**x))
            ]
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
@pytest.mark.parametrize(
    "strength", [torch.tensor(0.7, requires_grad=True), torch.tensor(0.7)], ids=["leaf", "constant"]
)
def test_opcheck(strength):
    arguments = routed_attention_arguments(**SMALL)
    factors = [*(x.detach() for x in arguments["routing"][:6]), torch.stack((strength, torch.tensor(0.3)))]
    heads = [arguments[name].detach() for name in ("query", "key", "value")]
    inputs = (*heads, factors, 1.0, None, None, None, None, "cpu")
    torch.library.opcheck(torch.ops.route_kernels.routed_attention.default, inputs)


def test_one_strength_for_each_call_of_vmap():
    arguments = routed_attention_arguments(**SMALL)

    def attend(strength):
        return rk.routed_attention(**{**arguments, "routing": arguments["routing"]._replace(strength=strength)})

    strengths = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(torch.vmap(attend)(strengths), torch.stack([attend(x) for x in strengths]))
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(lambda x: attend(x).sum()))(strengths),
        torch.stack([torch.func.grad(lambda x: attend(x).sum())(x) for x in strengths]),
    )


@each_backend
def test_a_strength_of_any_dtype(backend):
    skip_unless_it_runs(backend)
    arguments = routed_attention_arguments(**SMALL)
    expected = attended(arguments, 0.5, 0.25, backend)
    found = attended(arguments, torch.tensor(0.5, dtype=torch.float64, requires_grad=True), torch.tensor(0.25), backend)
    assert found.pop("grad routing.strength").dtype == torch.float64
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_the_bias_written_out():
    routing = routed_attention_arguments(**SMALL)["routing"]
    plain = rk.routing_bias(routing._replace(limit=0.3))
    for strength in (0.4, torch.tensor(0.4)):
        for limit in (0.3, torch.tensor(0.3)):
            found = rk.routing_bias(routing._replace(limit=limit, strength=strength))
            torch.testing.assert_close(found, 0.4 * plain)


def test_a_router_hands_a_tensor_on():
    router, query = QueryRouter(8, rank=4), torch.randn(2, 5, 8)
    strength = torch.tensor(0.4, requires_grad=True)
    factors = router(query, strength=strength)
    assert factors.strength is strength and factors.limit == 5.0
    torch.testing.assert_close(rk.routing_bias(factors), rk.routing_bias(router(query, strength=0.4)))
    assert router(query, strength=0.4).strength == 1.0, "a number is folded into the factors"


@pytest.mark.parametrize(
    "field, given, error, message",
    [
        ("limit", torch.tensor(1.0, requires_grad=True), TypeError, "expected no gradient, got a tensor that requires"),
        ("limit", torch.ones(1), TypeError, r"expected a number, got a tensor of shape \[1\]"),
        ("strength", torch.ones(2), TypeError, r"expected a number, got a tensor of shape \[2\]"),
        (
            "strength",
            torch.tensor(True),
            TypeError,
            r"expected a number, got a tensor of shape \[\] and dtype torch.bool",
        ),
        ("strength", "one", TypeError, "expected a number, got 'one'"),
        ("strength", None, TypeError, "expected a number, got NoneType"),
        ("strength", torch.ones((), device="meta"), ValueError, "expected on cpu like routing.sup_q, got one on meta"),
        ("limit", torch.ones((), device="meta"), ValueError, "expected on cpu like routing.sup_q, got one on meta"),
    ],
)
def test_bad_tensors(field, given, error, message):
    arguments = routed_attention_arguments(**SMALL)
    arguments["routing"] = arguments["routing"]._replace(**{field: given})
    for backend in (None, "reference"):
        with rk.backend(backend), pytest.raises(error, match=rf"^routed_attention: routing\.{field}: {message}"):
            rk.routed_attention(**arguments)
