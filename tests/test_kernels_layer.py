"""The layer for the `kernels` package keeps to what `kernelize` accepts; runs without that package."""

import inspect
from types import MethodType

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from integration_checks import check_integration
from torch import nn
from transformers.models.rt_detr import modeling_rt_detr
from transformers_models import EXAMPLES, model_and_inputs

from route_kernels.integrations.codebase import applying
from route_kernels.integrations.kernels import LAYER, LayerRepository

THEIRS = modeling_rt_detr.MultiScaleDeformableAttention


def test_members_and_arguments():
    """`kernels` refuses a layer with a constructor, with other members, or with other arguments."""
    ours = LayerRepository().load()
    members = {name for name in vars(ours) if not name.startswith("__")}
    assert issubclass(ours, nn.Module) and ours.__name__ == LAYER == LayerRepository().layer_name == THEIRS.__name__
    assert members == {"forward", "has_backward", "can_torch_compile"} and "__init__" not in vars(ours)
    assert ours.has_backward and ours.can_torch_compile
    expected, found = (inspect.signature(layer.forward).parameters.values() for layer in (THEIRS, ours))
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in expected]


def test_its_forward_in_the_place_of_theirs():
    model, inputs = model_and_inputs("rt_detr")

    def apply():
        with applying("kernels", verbose=False) as report:
            for name, module in model.named_modules():
                if isinstance(module, THEIRS):
                    forward = MethodType(LayerRepository().load().forward, module)
                    report.replace(module, "forward", forward, name=name, op="ms_deform_attn")
        return report

    check_integration(model, inputs, apply, {"ms_deform_attn": EXAMPLES["rt_detr"].calls})
