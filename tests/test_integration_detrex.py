"""detrex on our ops: a stub with detrex's file names, call paths and `_C`, which itself is not to be installed."""

import sys
from types import ModuleType

import foreign_mmcv
import pytest
import torch
from foreign_packages import check_no_kernel_no_change, check_one_model_alone, check_refusals, check_twice_and_back
from integration_checks import check_integration

from route_kernels.integrations import detrex as integration

MODULE = "detrex.layers.multi_scale_deform_attn"
SHAPES = ((5, 7), (3, 4))
POSITIONS = sum(height * width for height, width in SHAPES)


@pytest.fixture
def bindings(monkeypatch):
    """The file that is patched, and detrex.layers, which imports from it by value."""
    stub = foreign_mmcv.stub_package(MODULE, foreign_mmcv.C(), monkeypatch)
    layers = ModuleType("detrex.layers")
    layers.multi_scale_deformable_attn_pytorch = stub.multi_scale_deformable_attn_pytorch
    layers.MultiScaleDeformableAttention = stub.MultiScaleDeformableAttention
    monkeypatch.setitem(sys.modules, layers.__name__, layers)
    return stub


@pytest.fixture
def inputs():
    """As detrex's decoder layers pass them: batch second, boxes for reference points."""
    sizes = {"query": 6, "value": POSITIONS, "query_pos": 6}
    sequences = {name: torch.randn(size, 2, 16, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}
    return {
        **sequences,
        "key_padding_mask": torch.arange(POSITIONS).expand(2, -1) % 5 == 0,
        "reference_points": torch.rand(2, 6, 2, 4, dtype=torch.float64).requires_grad_(),
        "spatial_shapes": torch.tensor(SHAPES),
        "level_start_index": torch.tensor([0, 35]),
    }


def build(bindings):
    return bindings.MultiScaleDeformableAttention(16, 2, 2, 3).double()


def apply():
    return integration.apply(verbose=False)


def test_module(bindings, inputs):
    check_integration(build(bindings), inputs, apply, {"ms_deform_attn_fused": 1})


@pytest.mark.parametrize("compiled_for", ["cuda", "cpu"])
def test_a_forward_of_ones_own_reaches_the_plain_op(bindings, inputs, compiled_for):
    """Through the PyTorch form, or through the function over `_C`."""
    bindings.COMPILED_FOR = compiled_for

    class Local(bindings.MultiScaleDeformableAttention):
        forward = bindings.MultiScaleDeformableAttention.forward

    check_integration(Local(16, 2, 2, 3).double(), inputs, apply, {"ms_deform_attn": 1})
    assert bindings.compiled.calls == (2 if compiled_for == "cpu" else 0)  # before apply() and after revert()


def test_one_model_alone(bindings, inputs):
    check_one_model_alone(integration, lambda: build(bindings), inputs)


def test_no_kernel_no_change(bindings, inputs, monkeypatch):
    check_no_kernel_no_change(apply, build(bindings), inputs, monkeypatch)


def test_twice_and_back(bindings, capsys):
    owners = [
        (bindings.MultiScaleDeformableAttention, "forward"),
        (bindings.MultiScaleDeformableAttnFunction, "apply"),
        (bindings, "multi_scale_deformable_attn_pytorch"),
        (sys.modules["detrex.layers"], "multi_scale_deformable_attn_pytorch"),
    ]
    check_twice_and_back(integration, owners, capsys)


def test_refusals(bindings, monkeypatch):
    check_refusals(integration, MODULE, monkeypatch)
