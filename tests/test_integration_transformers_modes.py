"""transformers on our ops in the dtypes of real models, compiled and exported."""

import copy

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import EXAMPLES, attention_call, every_family, model_and_inputs

import route_kernels as rk
from route_kernels.integrations.codebases.transformers import apply
from route_kernels.testing import counted_calls, perturb_sampling, training_step

GROUPS = ["deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "mask2former"]
each_group = pytest.mark.parametrize("family", GROUPS)
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def quietly(model_or_family=None):
    return apply(model_or_family, verbose=False)


class Operators(TorchDispatchMode):
    """Which operators run, and those that make a tensor as large as `positions` x `channels` in a wide dtype."""

    def __init__(self, positions, channels):
        super().__init__()
        self.positions, self.channels = positions, channels
        self.names, self.wide = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        wide = isinstance(output, torch.Tensor) and output.dtype in (torch.float32, torch.float64)
        if wide and self.positions in output.shape and output.numel() >= 2 * self.positions * self.channels:
            self.wide.add(str(func))
        return output


def mixed(module, arguments, dtype):
    """The module in `dtype`, and its arguments with references in float32."""
    cast = {
        name: argument.detach().to(torch.float32 if name == "reference_points" else dtype)
        if isinstance(argument, torch.Tensor) and argument.is_floating_point()
        else argument
        for name, argument in arguments.items()
    }
    return copy.deepcopy(module).to(dtype), cast


@each_half
@each_group
def test_half_precision_values_with_float32_references(family, dtype):
    module, arguments = attention_call(family)
    expected = module(**arguments)[0]
    half, arguments = mixed(module, arguments, dtype)
    memory = arguments["encoder_hidden_states"].requires_grad_()
    with quietly(half), Operators(memory.shape[1], memory.shape[2]) as operators:
        found = half(**arguments)[0]
        found.backward(torch.ones_like(found))
    assert "route_kernels.ms_deform_attn_fused.default" in operators.names
    assert found.dtype == dtype and memory.grad.dtype == dtype
    assert not operators.wide, "a copy of value in a wider dtype"
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-2 * expected.abs().max().item())


def test_a_float32_copy_of_value_is_noticed():
    module, arguments = attention_call("rt_detr")
    half, arguments = mixed(module, arguments, torch.bfloat16)
    memory = arguments["encoder_hidden_states"]
    half.value_proj.register_forward_hook(lambda _, inputs, output: output.float().to(torch.bfloat16))
    with quietly(half), Operators(memory.shape[1], memory.shape[2]) as operators:
        half(**arguments)
    assert operators.wide == {"aten._to_copy.default"}


@each_group
def test_autocast(family):
    module, arguments = attention_call(family)
    expected = module(**arguments)[0]
    single, arguments = mixed(module, arguments, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = single(**arguments)[0]
        with quietly(single), counted_calls() as counts:
            found = single(**arguments)[0]
    assert dict(counts) == {"ms_deform_attn_fused": 1} and found.dtype == theirs.dtype
    assert found.dtype == (torch.bfloat16 if hasattr(single, "output_proj") else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-2 * expected.abs().max().item())


@pytest.mark.parametrize("automatic", [False, True], ids=["cast", "autocast"])
@every_family
def test_a_whole_model_trains_in_bfloat16(family, automatic):
    model, inputs = model_and_inputs(family)
    perturb_sampling(model)
    dtype = torch.float32 if automatic else torch.bfloat16
    model.to(dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=automatic)
    with quietly(model), autocast, counted_calls() as counts:
        step = training_step(model, inputs)
    assert dict(counts) == {"ms_deform_attn_fused": EXAMPLES[family].calls}
    grads = {name: grad for name, grad in step.items() if name.startswith("grad") and grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all(grads[name].any() for name in grads if "sampling_offsets.weight" in name)


class Attention(nn.Module):
    """An attention module as a function of tensors alone."""

    def __init__(self, module, arguments):
        super().__init__()
        self.module = module
        self.settings = {name: x for name, x in arguments.items() if not isinstance(x, torch.Tensor)}

    def forward(self, **tensors):
        return self.module(**tensors, **self.settings)[0]


def wrapped(family):
    module, arguments = attention_call(family)
    tensors = {name: x.detach() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    return Attention(module, arguments), tensors


@each_group
def test_a_replaced_module_compiles_whole(family):
    attention, tensors = wrapped(family)
    expected = attention(**tensors)
    graphs = []

    def backend(graph, examples):
        graphs.append(graph.code)
        return graph

    with quietly(attention):
        found = torch.compile(attention, fullgraph=True, backend=backend)(**tensors)
    torch.testing.assert_close(found, expected)
    assert "route_kernels.ms_deform_attn_fused" in "".join(graphs)


def test_a_whole_replaced_model_compiles():
    model, inputs = model_and_inputs("rt_detr", decoder_layers=1)
    perturb_sampling(model)
    model.eval()
    expected = model(**inputs).logits
    graphs = []

    def backend(graph, examples):
        graphs.append(graph.code)
        return graph

    with quietly(model):
        found = torch.compile(model, backend=backend)(**inputs).logits
    torch.testing.assert_close(found, expected)
    assert "".join(graphs).count("route_kernels.ms_deform_attn_fused(") == 1


@each_group
def test_an_exported_module_is_as_it_always_was(family):
    attention, tensors = wrapped(family)
    original = torch.export.export(attention, (), tensors).graph_module.code
    with quietly(attention):
        program = torch.export.export(attention, (), tensors)
    assert program.graph_module.code == original
    torch.testing.assert_close(program.module()(**tensors), attention(**tensors))


@pytest.mark.filterwarnings("ignore")
def test_a_traced_module_is_plain_pytorch():
    """The TorchScript-based torch.onnx.export traces it the same way."""
    attention, tensors = wrapped("rt_detr")
    attention.requires_grad_(False)
    hidden_states = tensors.pop("hidden_states")
    with quietly(attention):
        traced = torch.jit.trace(lambda states: attention(hidden_states=states, **tensors), hidden_states)
    assert "route_kernels" not in str(traced.inlined_graph) and "grid_sampler" in str(traced.inlined_graph)


def test_an_asked_for_backend_is_used():
    attention, tensors = wrapped("rt_detr")
    expected = attention(**tensors)
    with quietly(attention), rk.backend("reference"), counted_calls() as counts:
        torch.testing.assert_close(attention(**tensors), expected)
    assert dict(counts) == {"ms_deform_attn_fused": 1}
