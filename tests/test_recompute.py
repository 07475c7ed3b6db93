"""recomputed, and the modules that project again in backward."""

import copy

import pytest
import torch
from saved_tensors import kept_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import route_kernels as rk
from route_kernels.nn import MSDeformAttn, RoutedSelfAttention

LEVELS = ((5, 7), (2, 3))
POSITIONS = 41


class Calls(TorchDispatchMode):
    """How often each operator is called below autograd."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def deformable(dtype=torch.float64):
    """(module, its inputs): an encoder layer's attention with a position shared by the images."""
    module = MSDeformAttn(16, len(LEVELS), 2, 2).to(dtype)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, POSITIONS, 16, dtype=dtype, requires_grad=True)
    position = torch.randn(1, POSITIONS, 16, dtype=dtype, requires_grad=True)
    return module, (x, torch.rand(2, POSITIONS, 1, 2, dtype=dtype), x, LEVELS, None, position)


def attention(dtype=torch.float64):
    x, position = (torch.randn(2, 9, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    return RoutedSelfAttention(16, 2).to(dtype), (x, position)


def gradients(module, inputs, function=None):
    wanted = [x for x in {id(x): x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad}.values()]
    output = (module if function is None else function)(*inputs)
    return [output, *torch.autograd.grad(output.square().sum(), [*wanted, *module.parameters()])]


@pytest.mark.parametrize("make, op", [(deformable, "ms_deform_attn_fused"), (attention, "routed_attention")])
def test_modules_project_again_and_sample_once(make, op):
    module, inputs = make()
    expected = gradients(module, inputs)
    module.recompute = True
    with Calls() as calls:
        found = gradients(module, inputs)
    for tensor, other in zip(found, expected, strict=True):
        assert (tensor - other).abs().max() <= 1e-9 * other.abs().max()
    assert calls.count[f"route_kernels::{op}"] == calls.count[f"route_kernels::{op}_backward"] == 1
    assert calls.count["route_kernels::add_linear"] == 2 * (2 if make is deformable else 1)


@pytest.mark.parametrize("make", [deformable, attention])
def test_projections_are_not_kept(make):
    module, inputs = make()
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    known = [*tensors, *module.parameters()]
    plain = kept_bytes(lambda: module(*inputs), but=known)
    module.recompute = True
    lean = kept_bytes(lambda: module(*inputs), but=known)
    assert lean == inputs[0].nbytes  # the input of the last projection
    assert plain >= 3 * lean


@pytest.mark.parametrize("make", [deformable, attention])
def test_compiled(make):
    torch._dynamo.reset()
    module, inputs = make(torch.float32)
    module.recompute = True
    expected = gradients(module, inputs)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for tensor, other in zip(gradients(module, inputs, compiled), expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-4)


def head_and_features():
    head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    return head, torch.randn(5, 8, dtype=torch.float64, requires_grad=True)


def test_a_head_is_run_again():
    head, x = head_and_features()
    expected = gradients(head, (x,))
    again = copy.deepcopy(head)
    found = gradients(again, (x,), lambda x: rk.recomputed(again, x, kept=()))
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor, other)
    known = [x, *again.parameters()]
    assert kept_bytes(lambda: rk.recomputed(again, x, kept=()), but=known) == 0
    assert kept_bytes(lambda: head(x), but=[x, *head.parameters()]) > 0


def test_random_numbers_are_drawn_alike():
    x = torch.ones(64, requires_grad=True)
    output = rk.recomputed(lambda x: nn.functional.dropout(x * x, 0.5), x, kept=(), random=True)
    (grad,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(grad, 2 * output.detach())


def test_without_gradients_it_is_a_call():
    head, x = head_and_features()
    with torch.no_grad():
        assert torch.equal(rk.recomputed(head, x), head(x))
