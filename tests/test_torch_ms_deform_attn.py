"""Calls written for the package torch-ms-deform-attn: ours takes them as they are, and agrees with it."""

import pytest
import torch

import route_kernels as rk
from route_kernels.integrations.extension import ms_deform_attn_forward
from route_kernels.testing import EAGER, counted_calls

SHAPES = torch.tensor([[6, 4], [3, 2]])
STARTS = torch.tensor([0, 24])


@pytest.fixture
def arguments():
    """value [B, S, H, D], spatial_shapes, level_start_index, ..., as that package names them."""
    value, locations = torch.randn(3, 30, 2, 8, dtype=torch.float64), torch.rand(3, 5, 2, 2, 4, 2, dtype=torch.float64)
    weights = torch.rand(3, 5, 2, 2, 4, dtype=torch.float64)
    return {
        "value": value.requires_grad_(),
        "spatial_shapes": SHAPES,
        "level_start_index": STARTS,
        "sampling_locations": locations.requires_grad_(),
        "attention_weights": weights.requires_grad_(),
    }


@pytest.fixture(params=["formula", "package"])
def peer(request):
    if request.param == "formula":
        return EAGER["ms_deform_attn"]
    reason = "torch-ms-deform-attn is not installed: pip install -r benchmarks/requirements.txt"
    return pytest.importorskip("torch_ms_deform_attn", reason=reason, exc_type=ImportError).ms_deform_attn


@pytest.fixture
def expected(peer, arguments):
    """The output, and the gradients of its sum of squares."""
    return outcome(peer(*arguments.values()), arguments)


def outcome(output, arguments):
    leaves = [tensor for tensor in arguments.values() if tensor.requires_grad]
    return output, *torch.autograd.grad(output.square().sum(), leaves)


CALLS = {
    "by position": lambda arguments: rk.ms_deform_attn(*arguments.values()),
    "by keyword": lambda arguments: rk.ms_deform_attn(**arguments),
    "im2col_step by position": lambda arguments: ms_deform_attn_forward(*arguments.values(), 2),
    "im2col_step by keyword": lambda arguments: ms_deform_attn_forward(**arguments, im2col_step=64),
    "check_cuda_metadata": lambda arguments: ms_deform_attn_forward(*arguments.values(), 64, check_cuda_metadata=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(call, arguments, expected):
    with counted_calls() as counts:
        found = outcome(call(arguments), arguments)
    assert counts == {"ms_deform_attn": 1}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("peer", ["package"], indirect=True)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_levels_give_zeros(call, peer, arguments):
    arguments |= {"spatial_shapes": SHAPES[:0], "level_start_index": STARTS[:0]}
    for name in ("sampling_locations", "attention_weights"):
        arguments[name] = arguments[name].detach()[:, :, :, :0].requires_grad_()
    found = outcome(call(arguments), arguments)
    assert found[0].shape == (3, 5, 16) and not any(tensor.any() for tensor in found)
    torch.testing.assert_close(found, outcome(peer(*arguments.values()), arguments))


@pytest.mark.parametrize("peer", ["package"], indirect=True)
def test_dtypes_under_autocast(peer, arguments):
    """docs/deformable_detr.md says so."""
    arguments = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}
    for dtype in (torch.float32, torch.bfloat16):
        arguments["value"] = arguments["value"].to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = [op(*arguments.values()).dtype for op in (peer, ms_deform_attn_forward, rk.ms_deform_attn)]
        assert found == [torch.float32, dtype, torch.bfloat16]
