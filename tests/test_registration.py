"""The whole matrix for every op, generated from the list of registered ops and the samples of the public ones."""

import functools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_checks import output_dtype_under_autocast
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import route_kernels as rk
from route_kernels import native, testing
from route_kernels.backends import OPS, PRODUCTS
from route_kernels.ops import registry
from route_kernels.testing import call, converted, declaration, map_tensors, named_tensors, outcome, sample_arguments

PUBLIC = (*OPS, *PRODUCTS)
PUBLIC_SAMPLES = [(op, label) for op in PUBLIC for label in sample_arguments(op)]
DIFFERENTIABLE = [(op, label) for op, label in PUBLIC_SAMPLES if call(op, sample_arguments(op)[label]).requires_grad]
FIRST_SAMPLES = [(op, next(iter(sample_arguments(op)))) for op in PUBLIC]
needs_native = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))
each_sample = pytest.mark.parametrize("op, label", PUBLIC_SAMPLES)
each_backend = pytest.mark.parametrize("backend", [None, "reference", "triton"])


def few_queries(backend):
    """Triton's interpreter is slow."""
    return {"batch": 1, "queries": 9} if backend == "triton" else {}


def why_not(op, backend):
    """The reason to skip an op on a backend, or None."""
    if op in PRODUCTS:
        return "the same on every backend" if backend == "triton" else None
    runs, reason = rk.can_run(op, backend or "reference", torch.empty(0))
    return None if runs else reason


def skip_unless_it_runs(op, backend):
    if reason := why_not(op, backend):
        pytest.skip(reason)


def sample(op, label, dtype=torch.float32, **sizes):
    return sample_arguments(op, dtype, **sizes)[label]


def public_outcome(op, arguments):
    output_shape = call(op, arguments).shape
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output_shape, generator=generator).to(next(named_tensors(arguments))[1].device)
    return outcome(lambda **arguments: call(op, arguments), arguments, grad_output)


class RecordCalls(TorchDispatchMode):
    """Every call of a registered op, below autograd: {name.overload: [(args, kwargs), ...]}, a default by its name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "route_kernels":
            self.calls.setdefault(name, []).append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@functools.cache
def recorded_calls(backend):
    with RecordCalls() as record, rk.backend(backend):
        for op, label in PUBLIC_SAMPLES:
            if not why_not(op, backend):
                public_outcome(op, sample(op, label, **few_queries(backend)))
    for name in registry.OPS:
        if name.endswith(".tensor"):  # levels are tensors in graphs alone: the calls with numbers, as such
            of_numbers = record.calls.get(name.removesuffix(".tensor"), [])
            record.calls[name] = [(levels_as_tensors(name, args), kwargs) for args, kwargs in of_numbers]
    return record.calls


def overload(name):
    """The registered op `name` or `name.overload`."""
    name, _, of = name.partition(".")
    return getattr(getattr(torch.ops.route_kernels, name), of or "default")


def levels_as_tensors(name, args):
    """The arguments of an op's default overload, for its overload `tensor`."""
    names = [argument.name for argument in overload(name)._schema.arguments]
    tensors = [torch.tensor(given) if isinstance(given, list) else given for given in args]
    return tuple(x.view(-1, 2) if name == "spatial_shapes" else x for name, x in zip(names, tensors, strict=False))


# ---- every registered op -------------------------------------------------------------------------------------------


@needs_native
def test_every_registered_op_is_reached_by_samples():
    assert set(registry.OPS) == set(recorded_calls("cpu")), "an op without samples: add them to route_kernels.testing"


def test_every_public_op_is_registered():
    assert set(PUBLIC) <= set(registry.OPS)
    assert all(public_name(name) in PUBLIC for name in registry.OPS)


def test_every_public_op_declares_what_tests_need():
    assert set(testing.NAMES) == set(PUBLIC)
    for op in PUBLIC:
        declared = declaration(op)
        assert (
            declared.SHAPES
            and declared.EMPTY
            and declared.BAD_INPUTS
            and {bad.op for bad in declared.BAD_INPUTS} == {op}
        )
        if op in OPS:
            assert declared.TINY and declared.DETECTOR and declared.OF_WORKERS and declared.MANY_GIGABYTES
            assert declared.MANY["batch"] > 2**16


def public_name(name):
    """The op whose forward or backward, with whatever overload, `name` is."""
    return name.partition(".")[0].removesuffix("_backward")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", registry.OPS)
def test_opcheck(name, backend):
    skip_unless_it_runs(public_name(name), backend)
    for args, kwargs in recorded_calls(backend)[name][: 1 if backend == "triton" else None]:
        differentiable = "_backward" not in name

        def fresh(argument, differentiable=differentiable):
            if isinstance(argument, list):
                return [fresh(x) for x in argument]
            if not isinstance(argument, torch.Tensor):
                return argument
            return argument.detach().clone().requires_grad_(argument.requires_grad and differentiable)

        torch.library.opcheck(overload(name), tuple(map(fresh, args)), kwargs)


# ---- every public op -----------------------------------------------------------------------------------------------


@each_sample
@each_backend
def test_fake_tensors_have_the_metadata_of_real_ones(op, label, backend):
    skip_unless_it_runs(op, backend)
    mode = FakeTensorMode()
    fakes = map_tensors(
        sample(op, label, **few_queries(backend)),
        lambda tensor: mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad),
    )
    with rk.backend(backend):
        real = public_outcome(op, sample(op, label, **few_queries(backend)))
        with mode:
            fake = public_outcome(op, fakes)
    assert fake.keys() == real.keys()
    for name, tensor in real.items():
        assert (fake[name].shape, fake[name].dtype) == (tensor.shape, tensor.dtype), name
        assert fake[name].stride() == tensor.stride(), name


def route_kernels_in(counter):
    """For each compiled graph that calls anything, the registered ops that it calls."""
    calls = [[node for node in graph.graph.nodes if node.op == "call_function"] for graph in counter.graphs]
    targets = [[str(node.target) for node in nodes] for nodes in calls if nodes]
    return [[target for target in graph if target.startswith("route_kernels.")] for graph in targets]


def check_compiled_once(op, label, counter, **sizes):
    torch._dynamo.reset()
    compiled = torch.compile(lambda **arguments: call(op, arguments), backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for queries in (9, 10, 21):
        arguments = sample(op, label, **sizes | {"queries": queries})
        grad_output = torch.randn(call(op, arguments).shape)
        expected = outcome(lambda **arguments: call(op, arguments), arguments, grad_output)
        results = outcome(compiled, arguments, grad_output)
        for name, tensor in expected.items():
            torch.testing.assert_close(results[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations)) == 1, compilations


@each_sample
def test_compiles_once_for_any_number_of_queries(op, label):
    counter = CompileCounterWithBackend("aot_eager")
    check_compiled_once(op, label, counter)
    fused = (native.load_error is None or op in PRODUCTS) and label != "mean"
    assert route_kernels_in(counter) == ([[f"route_kernels.{op}"]] if fused else [[]])


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_the_triton_backend_compiles_once(op, label):
    skip_unless_it_runs(op, "triton")
    counter = CompileCounterWithBackend("aot_eager")
    with rk.backend("triton"):
        check_compiled_once(op, label, counter, **few_queries("triton"))
    assert route_kernels_in(counter) == [[f"route_kernels.{op}"]]


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_the_reference_backend_compiles_once(op, label):
    counter = CompileCounterWithBackend("eager")
    with rk.backend("reference"):
        check_compiled_once(op, label, counter)
    assert route_kernels_in(counter) == [[]]


@needs_native
def test_a_compiled_call_follows_a_later_request_for_a_backend():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda arguments: call("routed_attention", arguments), backend=counter, fullgraph=True)
    arguments = sample("routed_attention", "routed")

    def check(backend):
        with rk.backend(backend):
            torch.testing.assert_close(compiled(arguments), call("routed_attention", arguments))

    for backend in (None, "reference", None):
        check(backend)
        assert route_kernels_in(counter) == [["route_kernels.routed_attention"], []][: counter.frame_count]
    with ThreadPoolExecutor(1) as threads:
        threads.submit(check, "cpu").result()  # its own request, and a graph of its own
    assert route_kernels_in(counter)[2:] == [["route_kernels.routed_attention"]]
    check(None)
    assert counter.frame_count == 3


def test_a_backend_may_be_requested_inside_a_compiled_function():
    def attend(arguments):
        with rk.backend("reference"):
            return call("routed_attention", arguments)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    arguments = sample("routed_attention", "routed")
    torch.testing.assert_close(torch.compile(attend, backend=counter, fullgraph=True)(arguments), attend(arguments))
    assert route_kernels_in(counter) == [[]]


@each_sample
@each_backend
def test_autocast(op, label, backend):
    skip_unless_it_runs(op, backend)
    arguments, double = (sample(op, label, dtype, **few_queries(backend)) for dtype in (torch.float32, torch.float64))
    _, first = next(named_tensors(double))
    takes_double = op in PRODUCTS or rk.can_run(op, backend or "reference", first)[0]
    with rk.backend(backend):
        expected = public_outcome(op, arguments)
        with torch.autocast("cpu", torch.bfloat16):
            results = public_outcome(op, arguments)
            doubled = call(op, double) if takes_double else None
    assert results["output"].dtype == output_dtype_under_autocast(op, torch.bfloat16)
    assert doubled is None or doubled.dtype == torch.float64
    for name, tensor in expected.items():
        assert name == "output" or results[name].dtype == torch.float32, name
        torch.testing.assert_close(results[name].float(), tensor, rtol=0.1, atol=0.1, msg=name)


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_a_compiled_call_follows_autocast(op, label):
    torch._dynamo.reset()
    compiled = torch.compile(lambda **arguments: call(op, arguments), backend="eager", fullgraph=True)
    arguments = sample(op, label)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, expected = compiled(**arguments), call(op, arguments)
        assert output.dtype == expected.dtype
        torch.testing.assert_close(output, expected)


@each_sample
@each_backend
def test_inference_mode_and_no_grad(op, label, backend):
    skip_unless_it_runs(op, backend)
    arguments = sample(op, label, **few_queries(backend))
    with rk.backend(backend):
        expected = call(op, arguments)
        with torch.no_grad():
            without_grad = call(op, arguments)
        with torch.inference_mode():
            outside = call(op, arguments)
            inside = call(op, converted(arguments, torch.float32))
    assert not without_grad.requires_grad and without_grad.grad_fn is None
    assert outside.is_inference() and inside.is_inference()
    for output in (without_grad, outside, inside):
        assert torch.equal(output, expected)


@each_backend
@pytest.mark.parametrize("op, dimension", [(op, dimension) for op in PUBLIC for dimension in declaration(op).EMPTY])
def test_a_dimension_of_size_0(op, dimension, backend):
    skip_unless_it_runs(op, backend)
    arguments = declaration(op).EMPTY[dimension]()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with rk.backend("reference"):
                expected = public_outcome(op, arguments)
            with rk.backend(backend):
                results = deterministic_outcome(op, arguments)  # fills what is not written with NaN
        for name, tensor in expected.items():
            tolerance = 0.05 if autocast else 1e-5
            torch.testing.assert_close(results[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@each_sample
@pytest.mark.parametrize("backend", [None, "reference"])
def test_meta_tensors_have_the_shapes_of_real_ones(op, label, backend):
    arguments = sample(op, label)
    with rk.backend(backend):
        real = public_outcome(op, arguments)
        for autocast in (False, True):
            metas = map_tensors(arguments, lambda x: x.detach().to("meta").requires_grad_(x.requires_grad))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # is the CPU's and not theirs
                results = public_outcome(op, metas)
            assert results.keys() == real.keys()
            for name, tensor in results.items():
                assert (tensor.shape, tensor.dtype) == (real[name].shape, real[name].dtype), name
                assert tensor.is_meta


@each_sample
@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic_mode_allows_it_and_changes_nothing(op, label, threads):
    torch.set_num_threads(threads)
    arguments = sample(op, label)
    expected, results = public_outcome(op, arguments), deterministic_outcome(op, arguments)
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name


@pytest.mark.parametrize("op, label", FIRST_SAMPLES)
def test_deterministic_mode_of_the_triton_backend(op, label):
    skip_unless_it_runs(op, "triton")
    arguments = sample(op, label, **few_queries("triton"))
    with rk.backend("triton"):
        expected = public_outcome(op, arguments)
        first, second = (deterministic_outcome(op, arguments) for _ in range(2))
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def deterministic_outcome(op, arguments):
    torch.use_deterministic_algorithms(True)  # also fills what `empty` allocates with NaN
    try:
        return public_outcome(op, arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("power", [1, 2])  # 1: the gradient of the output requires none
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("op, label", DIFFERENTIABLE)
def test_second_derivative_is_a_clear_error(op, label, backend, power):
    if op == "query_similarity":
        pytest.skip("mean is plain PyTorch: it has a second derivative (test_query_similarity)")
    skip_unless_it_runs(op, backend)
    arguments = sample(op, label, **few_queries(backend))
    wanted = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]
    with rk.backend(backend):
        grads = torch.autograd.grad((call(op, arguments) ** power).sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{op}: second derivatives are not supported .*reference"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)


@pytest.mark.parametrize("op, label", DIFFERENTIABLE)
def test_second_derivative_on_the_reference_backend(op, label):
    with rk.backend("reference"):
        arguments = sample(op, label)
        wanted = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]
        grads = torch.autograd.grad(call(op, arguments).square().sum(), wanted, create_graph=True)
        seconds = torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)
    assert all(tensor.isfinite().all() for tensor in seconds) and any(tensor.any() for tensor in seconds)


def function_of_one(op, label, dtype=torch.float32):
    """(a function of the sample's first tensor that requires a gradient, that tensor)."""
    arguments = sample(op, label, dtype)
    wanted = next(tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad)

    def function(x):
        return call(op, map_tensors(arguments, lambda tensor: x if tensor is wanted else tensor.detach()))

    return function, wanted.detach()


def with_dual_numbers(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FUSED = [(op, label) for op, label in DIFFERENTIABLE if op != "query_similarity"]  # mean is plain PyTorch
FORWARD_MODE = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "over reverse": lambda function, x: torch.func.hessian(lambda x: function(x).sum())(x),
    "dual numbers": with_dual_numbers,
    "dual numbers, recomputed": lambda function, x: with_dual_numbers(
        lambda x: rk.recomputed(function, x), x.requires_grad_()
    ),
}


@needs_native
@pytest.mark.parametrize("way", FORWARD_MODE)
@pytest.mark.parametrize("op, label", FUSED)
def test_forward_mode_is_a_clear_error(op, label, way):
    message = rf"^{op}: forward-mode differentiation is not supported .*with route_kernels.backend\("
    with pytest.raises(RuntimeError, match=message):
        FORWARD_MODE[way](*function_of_one(op, label))


@pytest.mark.parametrize("op, label", DIFFERENTIABLE)
def test_forward_mode_on_the_reference_backend(op, label):
    function, x = function_of_one(op, label, torch.float64)
    with rk.backend("reference"):
        output, pull_back = torch.func.vjp(function, x)
        direction, grad_output = torch.randn_like(x), torch.randn_like(output)
        (grad,) = pull_back(grad_output)
        _, tangent = torch.func.jvp(function, (x,), (direction,))
    torch.testing.assert_close((tangent * grad_output).sum(), (grad * direction).sum())


@pytest.mark.parametrize("op, label", PUBLIC_SAMPLES)
def test_no_tangent_no_error(op, label):
    arguments = sample(op, label)
    with forward_ad.dual_level():
        assert torch.equal(call(op, arguments), call(op, arguments))


@pytest.mark.parametrize("op, label", DIFFERENTIABLE)
def test_reverse_mode_of_torch_func(op, label):
    function, x = function_of_one(op, label, torch.float64)
    several = torch.stack([x, 0.9 * x, 1.1 * x], dim=1).requires_grad_()
    loss = lambda x: function(x).square().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(sum(loss(x) for x in several.unbind(1)), several)
    (by_vmap,) = torch.autograd.grad(torch.vmap(loss, 1)(several).sum(), several)
    several = several.detach()
    found = {
        "grad(vmap)": torch.func.grad(lambda several: torch.vmap(loss, 1)(several).sum())(several),
        "vmap(grad)": torch.vmap(torch.func.grad(loss), 1, 1)(several),
        "vjp": torch.func.vjp(lambda several: sum(loss(x) for x in several.unbind(1)), several)[1](torch.ones([]))[0],
        "autograd(vmap)": by_vmap,
    }
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("op, label", FUSED)
def test_gradients_in_a_batch_are_right_or_a_clear_error(op, label):
    function, x = function_of_one(op, label)
    output = function(x.requires_grad_())
    grad_outputs = torch.randn(2, *output.shape)
    expected = [torch.autograd.grad(output, x, grad, retain_graph=True)[0] for grad in grad_outputs]
    by_vmap = torch.vmap(torch.func.vjp(function, x.detach())[1])(grad_outputs)[0]
    torch.testing.assert_close(by_vmap, torch.stack(expected))
    try:
        (found,) = torch.autograd.grad(output, x, grad_outputs, is_grads_batched=True)
    except RuntimeError as error:
        assert re.match(rf"{op}: is_grads_batched=True, .*not supported .*with route_kernels.backend\(", str(error))
    else:
        torch.testing.assert_close(found, torch.stack(expected))


def test_a_call_for_nothing_is_a_clear_error():
    with pytest.raises(ValueError, match=r"^add_linear: torch.vmap: expected at least one call, got a dimension of s"):
        torch.vmap(function_of_one("add_linear", "shared position")[0])(torch.empty(0, 2, 9, 8))


@pytest.mark.parametrize("op, label", DIFFERENTIABLE)
def test_a_gradient_asked_for_alone_is_the_same(op, label):
    check_gradients_alone(op, sample(op, label))


@pytest.mark.parametrize("op, label", [case for case in FIRST_SAMPLES if case in DIFFERENTIABLE])
def test_a_gradient_asked_for_alone_is_the_same_on_the_triton_backend(op, label):
    skip_unless_it_runs(op, "triton")
    with rk.backend("triton"):
        check_gradients_alone(op, sample(op, label, **few_queries("triton")))


def check_gradients_alone(op, arguments):
    everything = public_outcome(op, arguments)
    for name, tensor in named_tensors(arguments):
        if not tensor.requires_grad:
            continue
        alone = map_tensors(arguments, lambda other, tensor=tensor: tensor if other is tensor else other.detach())
        results = public_outcome(op, alone)
        assert set(results) == {"output", f"grad {name}"}
        assert torch.equal(results[f"grad {name}"], everything[f"grad {name}"]), name


@pytest.mark.slow
@pytest.mark.parametrize("op, label", DIFFERENTIABLE)
def test_inductor(op, label):
    torch._dynamo.reset()
    arguments = sample(op, label)
    compiled = torch.compile(lambda **arguments: call(op, arguments), fullgraph=True, dynamic=True)
    grad_output = torch.randn(call(op, arguments).shape)
    expected = outcome(lambda **arguments: call(op, arguments), arguments, grad_output)
    for name, tensor in outcome(compiled, arguments, grad_output).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)
