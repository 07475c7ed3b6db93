"""Research code on our ops: the extension `MultiScaleDeformableAttention`, and its modules in the fused form."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from integration_checks import align_corners_mistaken, assert_agree, check_integration
from torch._dynamo.testing import CompileCounterWithBackend

import route_kernels as rk
from benchmarks import research_modules
from benchmarks.research_modules import EXTENSION, MSDeformAttn, MSDeformAttnFunction, compiled_extension
from route_kernels.integrations import deformable_detr
from route_kernels.integrations.extension import ms_deform_attn_backward, ms_deform_attn_forward
from route_kernels.testing import counted_calls, training_step

SHAPES = torch.tensor([[6, 4], [3, 2]])
STARTS = torch.tensor([0, 24])
POSITIONS = 30
CHANNELS, HEADS = 8, 2


@pytest.fixture(autouse=True)
def nothing_provided():
    deformable_detr.revert()
    assert EXTENSION not in sys.modules
    yield
    deformable_detr.revert()
    assert EXTENSION not in sys.modules


@pytest.fixture
def compiled(monkeypatch):
    """Somebody's compiled extension, imported before ours."""
    extension = compiled_extension()
    monkeypatch.setitem(sys.modules, EXTENSION, extension)
    return extension


def samples(dtype=torch.float64, batch=2, queries=5, points=3):
    """value, locations and weights; nothing near a pixel's edge, where the derivative jumps."""
    value = torch.randn(batch, POSITIONS, HEADS, CHANNELS // HEADS, dtype=torch.float64)
    pixels = torch.rand(batch, queries, HEADS, 2, points, 2, dtype=torch.float64) * 0.8 + 0.1
    size = SHAPES.flip(-1)[:, None]
    locations = (torch.randint(-1, 5, pixels.shape) + pixels + 0.5) / size
    weights = torch.rand(batch, queries, HEADS, 2, points, dtype=torch.float64)
    return tuple(x.to(dtype).requires_grad_() for x in (value, locations, weights))


def through_the_extension(value, locations, weights, im2col_step=64):
    import MultiScaleDeformableAttention as MSDA

    return MSDeformAttnFunction.apply(MSDA, value, SHAPES, STARTS, locations, weights, im2col_step)


class Model(torch.nn.Module):
    def __init__(self, attention=MSDeformAttn):
        super().__init__()
        self.points = attention(CHANNELS, 2, HEADS, 3)
        self.boxes = attention(CHANNELS, 2, HEADS, 3)

    def forward(self, query, memory, points, boxes, padding_mask):
        query = query + self.points(query, points, memory, SHAPES, STARTS, padding_mask)
        return query + self.boxes(query, boxes, memory, SHAPES, STARTS)


def model_inputs(dtype=torch.float64, batch=2):
    random = {
        "query": torch.randn(batch, 5, CHANNELS),
        "memory": torch.randn(batch, POSITIONS, CHANNELS),
        "points": torch.rand(batch, 5, 2, 2),
        "boxes": torch.rand(batch, 5, 2, 4),
    }
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in random.items()}
    return inputs | {"padding_mask": torch.rand(batch, POSITIONS) < 0.2}


def perturbed_model(dtype=torch.float64):
    model = Model().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("batch, im2col_step", [(2, 64), (3, 2)], ids=["", "batch no multiple of im2col_step"])
def test_gradcheck_of_the_calling_convention(backend, batch, im2col_step):
    deformable_detr.apply(verbose=False)
    with rk.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *inputs: through_the_extension(*inputs, im2col_step), samples(batch=batch, queries=2, points=2)
        )


def test_gradcheck_notices_a_wrong_gradient(monkeypatch):
    deformable_detr.apply(verbose=False)

    def mistaken(*arguments):
        value, locations, weights = ms_deform_attn_backward(*arguments)
        return value, locations * 1.01, weights

    monkeypatch.setattr(sys.modules[EXTENSION], "ms_deform_attn_backward", mistaken)
    assert not torch.autograd.gradcheck(through_the_extension, samples(queries=2, points=2), raise_exception=False)


def test_the_convention_of_a_compiled_extension(compiled):
    inputs = samples()
    expected = training_step(through_the_extension, inputs)
    report = deformable_detr.apply(verbose=False)
    assert sys.modules[EXTENSION] is compiled
    assert [entry.name for entry in report.replaced] == [
        f"{EXTENSION}.ms_deform_attn_forward", f"{EXTENSION}.ms_deform_attn_backward",
    ]  # fmt: skip
    with counted_calls() as counts:
        found = training_step(through_the_extension, inputs)
    assert counts == {"ms_deform_attn": 1}, "backward calls no forward"
    assert_agree(found, expected)
    with align_corners_mistaken(), pytest.raises(AssertionError, match="results differ"):
        assert_agree(training_step(through_the_extension, inputs), expected)


def test_revert_gives_a_compiled_extension_its_functions_back(compiled):
    functions = dict(vars(compiled))
    with deformable_detr.apply(verbose=False):
        assert dict(vars(compiled)) != functions
    assert dict(vars(compiled)) == functions


def test_where_no_kernel_runs_the_compiled_functions_do(compiled, monkeypatch):
    deformable_detr.apply(verbose=False)
    monkeypatch.setattr("route_kernels.native.load_error", "not built")
    with counted_calls() as counts:
        through_the_extension(*samples()).sum().backward()
        with pytest.raises(AssertionError):
            through_the_extension(*samples(batch=3), im2col_step=2)
    assert not counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_native(dtype):
    deformable_detr.apply(verbose=False)
    value, locations, weights = samples(torch.float32)
    value = value.detach().to(dtype).requires_grad_()  # what autocast gives: a half value, float32 locations
    exact = training_step(
        through_the_extension, tuple(x.detach().double().requires_grad_() for x in (value, locations, weights))
    )
    found = training_step(through_the_extension, (value, locations, weights))
    dtypes = {"output 0": dtype, "grad input 0": dtype, "grad input 1": torch.float32, "grad input 2": torch.float32}
    assert {name: tensor.dtype for name, tensor in found.items()} == dtypes
    assert_agree(found, exact, tolerance=4 * torch.finfo(dtype).eps)


def test_autocast_does_not_change_what_the_extension_gets():
    deformable_detr.apply(verbose=False)
    inputs = samples(torch.float32)
    expected = through_the_extension(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = through_the_extension(*inputs)
        (grad,) = torch.autograd.grad(found.sum(), inputs[0])
    assert torch.equal(found, expected)
    assert grad.dtype == torch.float32


def test_the_shapes_are_read_at_every_call():
    deformable_detr.apply(verbose=False)
    inputs, shapes = samples(), SHAPES.clone()
    first = ms_deform_attn_forward(inputs[0], shapes, STARTS, *inputs[1:], 64)
    shapes.copy_(SHAPES.flip(-1))
    second = ms_deform_attn_forward(inputs[0], shapes, STARTS, *inputs[1:], 64)
    assert not torch.allclose(first, second)
    assert torch.equal(second, rk.ms_deform_attn(inputs[0], [(4, 6), (2, 3)], None, *inputs[1:]))


def test_the_forward_is_differentiable_without_an_autograd_function():
    """The calling convention of `torch-ms-deform-attn`: one function, im2col_step last."""
    value, locations, weights = samples()
    step = training_step(
        lambda *inputs: ms_deform_attn_forward(inputs[0], SHAPES, STARTS, *inputs[1:], 64), (value, locations, weights)
    )
    expected = training_step(
        lambda *inputs: research_modules.grid_samples(inputs[0], SHAPES, *inputs[1:]), (value, locations, weights)
    )
    assert_agree(step, expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"grad_output": torch.zeros(2, 5, 7)}, ValueError, "grad_output: expected shape"),
        ({"grad_output": torch.zeros(2, 5, 8)}, TypeError, "grad_output: expected dtype torch.float64"),
        ({"starts": torch.tensor([0, 25])}, ValueError, "level_start_index"),
        ({"weights": torch.zeros(2, 5, HEADS, 2, 4, dtype=torch.float64)}, ValueError, "attention_weights"),
        ({"value": None}, TypeError, "value: expected a tensor"),
    ],
)
def test_bad_input_of_the_backward(change, error, message):
    value, locations, weights = samples()
    arguments = {"value": value, "shapes": SHAPES, "starts": STARTS, "locations": locations, "weights": weights}
    arguments |= {"grad_output": torch.zeros(2, 5, CHANNELS, dtype=torch.float64)}
    ms_deform_attn_backward(*arguments.values(), 64)
    with pytest.raises(error, match=message):
        ms_deform_attn_backward(*(arguments | change).values(), 64)


def test_an_explicit_backend_runs_or_raises():
    deformable_detr.apply(verbose=False)
    output = through_the_extension(*samples())
    with rk.backend("cuda"):
        with pytest.raises(rk.BackendUnavailableError):
            through_the_extension(*samples())
        with pytest.raises(rk.BackendUnavailableError):
            output.sum().backward()


def test_modules_in_the_fused_form(compiled):
    model = perturbed_model()
    report = check_integration(
        model, model_inputs(), lambda: deformable_detr.apply(model, verbose=False), {"ms_deform_attn_fused": 2}
    )
    assert {entry.name: entry.op for entry in report.replaced}.items() >= {
        ("points", "ms_deform_attn_fused"), ("boxes", "ms_deform_attn_fused"),
    }  # fmt: skip


def test_modules_in_the_plain_form(compiled):
    check_integration(
        perturbed_model(), model_inputs(), lambda: deformable_detr.apply(verbose=False), {"ms_deform_attn": 2}
    )


def test_a_fused_model_in_bfloat16_keeps_its_dtype():
    model = perturbed_model(torch.bfloat16)
    deformable_detr.apply(model, verbose=False)
    inputs = model_inputs(torch.bfloat16)
    with counted_calls() as counts:
        output = model(**inputs)
    assert output.dtype == torch.bfloat16
    assert counts == {"ms_deform_attn_fused": 2}


def saved_elements(model, inputs):
    """Number of elements that autograd keeps for backward, besides inputs and parameters."""
    kept = {}
    given = {x.data_ptr() for x in (*model.parameters(), *inputs.values())}

    def keep(tensor):
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(tensor.numel() for tensor in kept.values())


def test_the_fused_form_keeps_what_the_linear_layers_gave():
    deformable_detr.apply(verbose=False)
    model, inputs = perturbed_model(), model_inputs()
    plain = saved_elements(model, inputs)
    deformable_detr.apply(model, verbose=False)
    samples = 2 * 5 * HEADS * 2 * 3
    value, offsets, logits, sampled = 2 * POSITIONS * CHANNELS, 2 * samples, samples, 2 * 5 * CHANNELS
    first_result = sampled  # the second module's query
    assert saved_elements(model, inputs) == 2 * (value + offsets + logits + sampled) + first_result < plain


def test_copies_and_pickles_of_a_fused_model():
    model = perturbed_model()
    deformable_detr.apply(model, verbose=False)
    inputs = model_inputs()
    expected = model(**inputs)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with counted_calls() as counts:
        assert torch.equal(average(**inputs), expected), "a copy computes with its own parameters"
    assert counts == {"ms_deform_attn_fused": 2}
    again = deformable_detr.apply(average, verbose=False)
    assert not again.replaced and "already replaced by an earlier apply()" in {entry.reason for entry in again.left}
    unpickled = pickle.loads(pickle.dumps(average))
    assert_agree({"output": unpickled(**inputs)}, {"output": expected})
    assert len(deformable_detr.apply(unpickled, verbose=False).replaced) == 2


class OtherBoxes(MSDeformAttn):
    """A fork of the same names, whose boxes are whole where the published module's are half."""

    def box_scale(self):
        return 1.0


class NoGradientOfReferences(MSDeformAttn):
    def attend(self, query, reference_points, *arguments):
        return super().attend(query, reference_points.detach(), *arguments)


class Modulated(MSDeformAttn):
    def forward(self, query, reference_points, memory, modulation):
        raise NotImplementedError


class Broken(MSDeformAttn):
    def sample(self, *arguments):
        raise RuntimeError("CUDA only\nsorry")


@pytest.mark.parametrize(
    "fork, reason",
    [
        (OtherBoxes, "something else than the published module (reference points of 4 numbers)"),
        (NoGradientOfReferences, "something else than the published module (reference points of 2 numbers)"),
        (Modulated, "Modulated is not the published module: expected sampling_offsets"),
        (Broken, "its own forward does not run on a small CPU example: RuntimeError: CUDA only"),
    ],
)
def test_a_fork_that_computes_something_else_is_left_alone(fork, reason):
    model = Model(fork)
    report = deformable_detr.apply(model, verbose=False)
    assert [entry.name for entry in report.left] == ["points", "boxes"]
    assert all(reason in entry.reason and "\n" not in entry.reason for entry in report.left)
    assert "forward" not in vars(model.points)


def float32_by(decorator):
    return type("Decorated", (MSDeformAttn,), {"forward": decorator(MSDeformAttn.forward)})


@pytest.mark.parametrize(
    "attention",
    [
        MSDeformAttn,
        float32_by(torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)),
        float32_by(torch.autocast("cpu", enabled=False)),
    ],
)
def test_under_autocast_a_replaced_module_returns_what_the_original_does(compiled, attention):
    model, inputs = Model(attention), model_inputs(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        exact = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.points(*(inputs[name] for name in ("query", "points", "memory")), SHAPES, STARTS)
            with deformable_detr.apply(model, verbose=False) as report, counted_calls() as counts:
                found = model.points(*(inputs[name] for name in ("query", "points", "memory")), SHAPES, STARTS)
                output = model(**inputs)
    assert {"points", "boxes"} < {entry.name for entry in report.replaced} and counts == {"ms_deform_attn_fused": 3}
    in_float32 = attention is not MSDeformAttn
    assert found.dtype == expected.dtype == (torch.float32 if in_float32 else torch.bfloat16)
    tolerance = 1e-5 if in_float32 else 3e-2
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(output.float(), exact, atol=tolerance, rtol=tolerance)


class Switches(MSDeformAttn):
    """A cast that no decorator makes."""

    device = "cpu"

    def attend(self, *arguments):
        with torch.autocast(self.device, enabled=False):
            return super().attend(*arguments)


class SwitchesThatOfAnotherDevice(Switches):
    device = "cuda"


@pytest.mark.parametrize(
    "fork, reason",
    [
        (Switches, "under autocast it returns torch.float32, the replacement torch.bfloat16"),
        (SwitchesThatOfAnotherDevice, "it switches autocast of cuda: apply() once it is there, where it is compared"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_forward_that_casts_by_itself_is_left_alone(fork, reason):
    model = Model(fork)
    report = deformable_detr.apply(model, verbose=False)
    assert {entry.name: entry.reason for entry in report.left} == {"points": reason, "boxes": reason}
    assert "forward" not in vars(model.points)


def test_a_forward_that_other_code_replaced_is_left_alone():
    model = Model()
    model.points.forward = lambda *arguments: arguments[0]
    report = deformable_detr.apply(model, verbose=False)
    assert {entry.name: entry.reason for entry in report.left} == {
        "points": "other code has replaced its forward: apply() first, that code afterwards"
    }


def test_models_without_such_modules_and_no_models():
    report = deformable_detr.apply(torch.nn.Linear(2, 2), verbose=False)
    assert [entry.name for entry in report.left] == ["Linear"]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module or None, got str"):
        deformable_detr.apply("dino", verbose=False)


def test_applied_twice(capsys):
    model = Model()
    first = deformable_detr.apply(model)
    assert str(first) in capsys.readouterr().out
    second = deformable_detr.apply(model, verbose=False)
    assert second.replaced == []
    assert {entry.reason for entry in second.left} == {"already ours", "already replaced by an earlier apply()"}
    assert capsys.readouterr().out == ""


def test_importing_the_integration_provides_nothing_before_apply():
    script = f"import sys, route_kernels as rk; rk.integrations.deformable_detr; sys.exit({EXTENSION!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    assert EXTENSION not in sys.modules
    deformable_detr.apply(verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from MultiScaleDeformableAttention import ms_deform_attn_forward as found
    assert found is ms_deform_attn_forward


def test_revert_does_not_undo_what_somebody_else_did_since(monkeypatch):
    report = deformable_detr.apply(verbose=False)
    ours = sys.modules[EXTENSION]
    monkeypatch.setitem(sys.modules, EXTENSION, compiled_extension())
    with pytest.raises(RuntimeError, match=f"{EXTENSION} of dict has been replaced by other code since apply"):
        report.revert()
    sys.modules[EXTENSION] = ours


@pytest.mark.parametrize("fused", [True, False])
def test_compiles_as_one_graph(fused):
    """The fused form, and research code's own module and autograd function over our extension."""
    model, inputs = Model().double(), model_inputs()
    with deformable_detr.apply(model if fused else None, verbose=False):
        expected = model(**inputs)
        graphs = CompileCounterWithBackend("aot_eager")
        found = torch.compile(model, backend=graphs, fullgraph=True)(**inputs)
        torch.testing.assert_close(found, expected)
        leaves = [*model.parameters(), *(tensor for tensor in inputs.values() if tensor.requires_grad)]
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected)))
    called = [str(node.target) for graph in graphs.graphs for node in graph.graph.nodes]
    assert not fused or called.count("route_kernels.ms_deform_attn_fused.tensor") == 2
