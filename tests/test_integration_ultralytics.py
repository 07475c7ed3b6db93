"""ultralytics on our ops: its RT-DETR decoder, its attention module, its function."""

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

pytest.importorskip("ultralytics", reason="ultralytics is not installed: pip install ultralytics")

from ultralytics.nn.modules import transformer as bindings
from ultralytics.nn.modules import utils
from ultralytics.nn.modules.head import RTDETRDecoder

from route_kernels.integrations import ultralytics as integration
from route_kernels.testing import EAGER, counted_calls, perturb_sampling

SHAPES = [[5, 7], [3, 4]]
POSITIONS = sum(height * width for height, width in SHAPES)
FUNCTION = "multi_scale_deformable_attn_pytorch"


def apply():
    return integration.apply(verbose=False)


def attention():
    module = bindings.MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3).double()
    perturb_sampling(module)
    return module


def inputs(reference=4, levels=1):
    query, memory = (torch.randn(2, length, 16, dtype=torch.float64).requires_grad_() for length in (6, POSITIONS))
    return {
        "query": query,
        "refer_bbox": torch.rand(2, 6, levels, reference, dtype=torch.float64).requires_grad_(),
        "value": memory,
        "value_shapes": SHAPES,
        "value_mask": torch.arange(POSITIONS).expand(2, -1) % 5 == 0,
    }


def test_decoder_of_rt_detr():
    decoder = RTDETRDecoder(nc=5, ch=(8, 16, 16), hd=32, nq=10, ndp=2, nh=4, ndl=2, d_ffn=32, nd=4).double()
    features = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((8, 8), (16, 4), (16, 2))]
    check_integration(decoder, (features,), apply, {"ms_deform_attn_fused": 2})


def test_module_with_reference_boxes():
    check_integration(attention(), inputs(4), apply, {"ms_deform_attn_fused": 1})


def test_module_with_reference_points():
    check_integration(attention(), inputs(2), apply, {"ms_deform_attn_fused": 1})


def test_a_forward_of_ones_own_reaches_the_plain_op():
    class Local(bindings.MSDeformAttn):
        forward = bindings.MSDeformAttn.forward

    check_integration(Local(16, 2, 2, 3).double(), inputs(), apply, {"ms_deform_attn": 1})


@pytest.mark.parametrize("rank", [5, 6])
def test_function_of_this_and_of_older_versions(rank):
    value, locations = torch.randn(2, POSITIONS, 2, 8), torch.rand(2, 4, 2, 2, 3, 2)
    weights = torch.rand(2, 4, 2, 2, 3)
    expected = EAGER["ms_deform_attn"](value, SHAPES, None, locations, weights)
    if rank == 5:
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    with apply(), counted_calls() as counts:
        found = utils.multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)
    assert counts == {"ms_deform_attn": 1}
    torch.testing.assert_close(found, expected)


def test_traced_graph_is_the_original():
    module, arguments = attention().eval(), inputs()
    shapes = arguments.pop("value_shapes")

    def traced():
        call = torch.nn.Module()
        call.attention = module
        call.forward = lambda query, refer_bbox, value, value_mask: module(query, refer_bbox, value, shapes, value_mask)
        graph = torch.jit.trace(call, tuple(arguments.values()), check_trace=False).inlined_graph
        return [node.kind() for node in graph.nodes()]

    original = traced()
    with apply():
        assert traced() == original


def test_compiles_without_a_graph_break():
    module, arguments = attention(), inputs()
    with integration.apply(module, verbose=False):
        expected = module(**arguments)
        found = torch.compile(module, fullgraph=True, backend="aot_eager")(**arguments)
    torch.testing.assert_close(found, expected)


def test_low_precision():
    check_low_precision(apply, attention(), inputs(), "refer_bbox")


def test_one_model_alone():
    check_one_model_alone(integration, attention, inputs())


def test_no_kernel_no_change(monkeypatch):
    check_no_kernel_no_change(apply, attention(), inputs(), monkeypatch)


def test_twice_and_back(capsys):
    check_twice_and_back(
        integration, [(bindings.MSDeformAttn, "forward"), (bindings, FUNCTION), (utils, FUNCTION)], capsys
    )


def test_refusals(monkeypatch):
    check_refusals(integration, bindings.__name__, monkeypatch)
