"""The definitions in multi_scale_deform_attn of mmcv and detrex: two call paths, the module in front of them.

Executed anew for each stub (`stub_package`), so that names are looked up in the stub's own globals, as in theirs.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import torch
from torch import nn
from torch.autograd import Function

from route_kernels.testing import grid_sampled

COMPILED_FOR = "cuda"
"""The device whose tensors go to the compiled functions."""


def stub_package(name, compiled, monkeypatch):
    """This file as the module `name`, over compiled functions of either calling convention."""
    spec = spec_from_file_location(name, __file__)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    module.compiled = compiled
    monkeypatch.setitem(sys.modules, f"{name.partition('.')[0]}._ext", compiled)
    while name := name.rpartition(".")[0]:
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return module


def _differentiable(value, locations, weights):
    return [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]


class Ext:
    """`mmcv._ext`: backward fills the gradients that it is given."""

    returns_gradients = False

    def __init__(self):
        self.calls = 0

    def ms_deform_attn_forward(self, value, shapes, starts, locations, weights, im2col_step):
        assert value.shape[0] % min(im2col_step, value.shape[0]) == 0, "batch must divide im2col_step"
        self.calls += 1
        return grid_sampled(value, shapes, starts, locations, weights)

    def ms_deform_attn_backward(
        self, value, shapes, starts, locations, weights, grad, grad_value, grad_locations, grad_weights, im2col_step
    ):
        with torch.enable_grad():
            value, locations, weights = inputs = _differentiable(value, locations, weights)
            output = grid_sampled(value, shapes, starts, locations, weights)
        grads = torch.autograd.grad(output, inputs, grad)
        for place, found in zip((grad_value, grad_locations, grad_weights), grads, strict=True):
            place.copy_(found)


class C(Ext):
    """`detrex._C`: backward returns the gradients."""

    returns_gradients = True

    def ms_deform_attn_backward(self, value, shapes, starts, locations, weights, grad, im2col_step):
        grads = [torch.empty_like(tensor) for tensor in (value, locations, weights)]
        super().ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, *grads, im2col_step)
        return grads


class MultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return compiled.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)  # noqa: F821

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        compiled_backward = compiled.ms_deform_attn_backward  # noqa: F821
        if getattr(compiled, "returns_gradients", True):  # noqa: F821
            grads = compiled_backward(*inputs, grad, ctx.im2col_step)
        else:
            grads = [torch.zeros_like(inputs[i]) for i in (0, 3, 4)]
            compiled_backward(*inputs, grad, *grads, im2col_step=ctx.im2col_step)
        return grads[0], None, None, grads[1], grads[2], None


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    return grid_sampled(value, value_spatial_shapes, None, sampling_locations, attention_weights)


class MultiScaleDeformableAttention(nn.Module):
    def __init__(self, embed_dims, num_heads, num_levels, num_points, im2col_step=64, dropout=0.1, batch_first=False):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.im2col_step, self.batch_first = im2col_step, batch_first
        self.dropout = nn.Dropout(dropout)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, 2 * samples)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)

    def forward(
        self, query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None,
        reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs,
    ):  # fmt: skip
        identity = kwargs.get("residual", identity)
        identity = query if identity is None else identity
        value = query if value is None else value
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.permute(1, 0, 2), value.permute(1, 0, 2)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        by_level = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*by_level, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, by_level[1:])
        reference = reference_points[:, :, None, :, None]
        if reference.shape[-1] == 2:
            locations = reference + offsets / spatial_shapes.flip(-1)[:, None]
        else:
            locations = reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
        if value.device.type == COMPILED_FOR:
            output = MultiScaleDeformableAttnFunction.apply(
                value, spatial_shapes, level_start_index, locations, weights, self.im2col_step
            )
        else:
            output = multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)
        output = self.output_proj(output)
        return self.dropout(output if self.batch_first else output.permute(1, 0, 2)) + identity
