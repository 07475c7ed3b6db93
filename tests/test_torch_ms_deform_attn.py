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
def expected(request, arguments):
    """The output, and the gradients of its sum of squares."""
    op = EAGER["ms_deform_attn"]
    if request.param == "package":
        reason = "torch-ms-deform-attn is not installed: pip install -r benchmarks/requirements.txt"
        op = pytest.importorskip("torch_ms_deform_attn", reason=reason, exc_type=ImportError).ms_deform_attn
    return outcome(op(*arguments.values()), arguments)


def outcome(output, arguments):
    leaves = [tensor for tensor in arguments.values() if tensor.requires_grad]
    return output, *torch.autograd.grad(output.square().sum(), leaves)


CALLS = {
    "by position": lambda arguments: rk.ms_deform_attn(*arguments.values()),
    "by keyword": lambda arguments: rk.ms_deform_attn(**arguments),
    "im2col_step by position": lambda arguments: ms_deform_attn_forward(*arguments.values(), 2),
    "im2col_step by keyword": lambda arguments: ms_deform_attn_forward(**arguments, im2col_step=64),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls(call, arguments, expected):
    with counted_calls() as counts:
        found = outcome(call(arguments), arguments)
    assert counts == {"ms_deform_attn": 1}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
