"""rfdetr on our ops: RF-DETR Nano, built without weights; its attention module and its core."""

import pytest
import torch
from foreign_packages import (
    check_low_precision,
    check_no_kernel_no_change,
    check_one_model_alone,
    check_refusals,
    check_twice_and_back,
)
from integration_checks import check_integration

pytest.importorskip("rfdetr", reason="rfdetr is not installed: pip install rfdetr")

from rfdetr.config import RFDETRNanoConfig
from rfdetr.models.lwdetr import build_model_from_config
from rfdetr.models.ops import functions
from rfdetr.models.ops.functions import ms_deform_attn_func
from rfdetr.models.ops.modules import ms_deform_attn as bindings

from route_kernels.integrations import rfdetr as integration
from route_kernels.testing import perturb_sampling

SHAPES = [(5, 7), (3, 4)]
POSITIONS = sum(height * width for height, width in SHAPES)


def apply():
    return integration.apply(verbose=False)


@pytest.fixture(scope="module")
def nano():
    with pytest.warns(UserWarning, match="pretrain_weights=None"):
        config = RFDETRNanoConfig(
            pretrain_weights=None, device="cpu", resolution=64, positional_encoding_size=4, num_queries=8, group_detr=2
        )
    model = build_model_from_config(config).double()
    perturb_sampling(model)
    return model


def attention(points=3):
    module = bindings.MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=points).double()
    perturb_sampling(module)
    return module


def inputs(reference=4, levels=2, *, as_ints=True):
    query, memory = (torch.randn(2, length, 16, dtype=torch.float64).requires_grad_() for length in (6, POSITIONS))
    return {
        "query": query,
        "reference_points": torch.rand(2, 6, levels, reference, dtype=torch.float64).requires_grad_(),
        "input_flatten": memory,
        "input_spatial_shapes": torch.tensor(SHAPES),
        "input_level_start_index": torch.tensor([0, 35]),
        "input_padding_mask": torch.arange(POSITIONS).expand(2, -1) % 5 == 0,
        "input_spatial_shapes_hw": SHAPES if as_ints else None,
    }


def test_nano(nano):
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    check_integration(nano, (image,), apply, {"ms_deform_attn_fused": 2})


@pytest.mark.parametrize("reference", [2, 4])
@pytest.mark.parametrize("levels", [1, 2])
def test_module(reference, levels):
    check_integration(attention(), inputs(reference, levels), apply, {"ms_deform_attn_fused": 1})


def test_module_with_sizes_in_a_tensor():
    check_integration(attention(), inputs(as_ints=False), apply, {"ms_deform_attn_fused": 1})


@pytest.mark.parametrize("reference", [2, 4])
def test_exported_module(reference):
    module = attention()
    module.export()
    check_integration(module, inputs(reference), apply, {"ms_deform_attn_fused": 1})


@pytest.mark.parametrize("exported", [False, True])
def test_a_forward_of_ones_own_reaches_the_plain_op(exported):
    """Locations have rank 6, after .export() rank 5; value is [B, H, D, S]."""

    class Local(bindings.MSDeformAttn):
        forward = bindings.MSDeformAttn.forward

    module = Local(16, 2, 2, 3).double()
    if exported:
        module.export()
    check_integration(module, inputs(), apply, {"ms_deform_attn": 1})


def test_torch_export_records_the_original():
    module = attention()
    module.export()
    arguments = inputs()
    operators = []
    for context in (None, integration.apply(verbose=False)):
        exported = torch.export.export(module, (), kwargs=arguments)
        operators.append([str(node.target) for node in exported.graph.nodes])
        if context is not None:
            context.revert()
    assert operators[0] == operators[1]


def test_compiles_without_a_graph_break():
    module = attention()
    arguments = inputs()
    with integration.apply(module, verbose=False):
        expected = module(**arguments)
        found = torch.compile(module, fullgraph=True, backend="aot_eager")(**arguments)
    torch.testing.assert_close(found, expected)


def test_low_precision():
    check_low_precision(apply, attention(), inputs(), "reference_points")


def test_one_model_alone():
    check_one_model_alone(integration, attention, inputs())


def test_no_kernel_no_change(monkeypatch):
    check_no_kernel_no_change(apply, attention(), inputs(), monkeypatch)


def test_twice_and_back(capsys):
    core = "ms_deform_attn_core_pytorch"
    owners = [
        (bindings.MSDeformAttn, "forward"),
        *((owner, core) for owner in (bindings, functions, ms_deform_attn_func)),
    ]
    check_twice_and_back(integration, owners, capsys)


def test_refusals(monkeypatch):
    check_refusals(integration, "rfdetr.models.ops.modules.ms_deform_attn", monkeypatch)
