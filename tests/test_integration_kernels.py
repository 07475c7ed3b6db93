"""The layer that the `kernels` package puts into transformers' models, as an object and as a folder."""

import pytest

pytest.importorskip("kernels", reason="kernels is not installed: pip install --no-deps kernels")
pytest.importorskip("transformers", reason="transformers is not installed")

import kernels
import torch
from integration_checks import check_integration
from kernels import Mode
from torch import nn
from transformers.models.rt_detr import modeling_rt_detr
from transformers_models import EXAMPLES, model_and_inputs

import route_kernels as rk
from route_kernels.integrations.kernels import LAYER, LayerRepository, write_layer_repository
from route_kernels.testing import counted_calls

TRAINING = Mode.TRAINING | Mode.TORCH_COMPILE
SHAPES = [(4, 3), (2, 2)]


@kernels.use_kernel_forward_from_hub(LAYER)
class Layer(nn.Module):
    """A layer decorated as in transformers, whatever version of kernels that accepts."""

    forward = modeling_rt_detr.MultiScaleDeformableAttention.forward


@pytest.fixture(params=["object", "folder"])
def repository(request, tmp_path):
    if request.param == "object":
        return LayerRepository()
    return kernels.LocalLayerRepository(write_layer_repository(tmp_path), layer_name=LAYER)


def arguments():
    value = torch.randn(2, 16, 2, 4, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    return value, torch.tensor(SHAPES), SHAPES, torch.tensor([0, 12]), locations, weights, 64


def kernelized(model, repository, mode=TRAINING):
    with kernels.use_kernel_mapping({LAYER: {"cpu": repository}}, inherit_mapping=False):
        return kernels.kernelize(model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NO_LAYER)


def test_a_decorated_layer_runs_our_op(repository):
    inputs = arguments()
    tensors = [inputs[0], inputs[4], inputs[5]]
    expected = Layer()(*inputs)
    layer = kernelized(nn.Sequential(Layer()), repository)[0]
    with counted_calls() as counts:
        found = layer(*inputs)
    assert dict(counts) == {"ms_deform_attn": 1}
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(output.sum(), tensors) for output in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_kernelized_layer_compiles_whole(repository):
    inputs = arguments()
    layer = kernelized(nn.Sequential(Layer()), repository)[0]
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(*inputs), Layer()(*inputs))


def test_a_whole_model_is_kernelized(repository, monkeypatch):
    """transformers' own class, decorated here, too: with an older kernels than it wants its decorator does nothing."""
    layer = modeling_rt_detr.MultiScaleDeformableAttention
    monkeypatch.setattr(layer, "kernel_layer_name", LAYER, raising=False)
    monkeypatch.setattr(layer, "kernel_condition", staticmethod(lambda module: True), raising=False)
    model, inputs = model_and_inputs("rt_detr")

    def apply():
        report = rk.integrations.codebase.Report("kernels")
        kernelized(model, repository)
        for name, module in model.named_modules():
            if isinstance(module, layer):
                forward = vars(module).pop("forward")
                report.replace(module, "forward", forward, name=name, op="ms_deform_attn")
        return report

    check_integration(model, inputs, apply, {"ms_deform_attn": EXAMPLES["rt_detr"].calls})


def test_a_repository_is_its_own_equal():
    """kernels keeps loaded layers by repository."""
    assert LayerRepository() == LayerRepository() and hash(LayerRepository()) == hash(LayerRepository())
