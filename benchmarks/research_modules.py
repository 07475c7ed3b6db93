"""The public modules of research code, written anew from the papers: their names, arguments and calling conventions.

Plain PyTorch spells out their formulas, apart from ours: bias and similarity are written out as N x N.
"""

import math
import sys
from types import ModuleType

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from route_kernels.testing import grid_sampled

EXTENSION = "MultiScaleDeformableAttention"
BRICKS = "models.bricks.ms_deform_attn"


def grid_samples(value, shapes, locations, weights):
    """[B, N, H D]: the weighted sum of `grid_sample`s."""
    return grid_sampled(value, shapes, None, locations, weights)


def compiled_extension(name=EXTENSION):
    """A module with the two functions of the compiled extension, which asserts what the compiled one asserts."""

    def forward(value, shapes, starts, locations, weights, im2col_step):
        assert value.shape[0] % min(value.shape[0], im2col_step) == 0
        with torch.no_grad():
            return grid_samples(value, shapes, locations, weights)

    def backward(value, shapes, starts, locations, weights, grad_output, im2col_step):
        leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
        with torch.enable_grad():
            output = grid_samples(leaves[0], shapes, *leaves[1:])
        return list(torch.autograd.grad(output, leaves, grad_output))

    module = ModuleType(name)
    module.ms_deform_attn_forward, module.ms_deform_attn_backward = forward, backward
    return module


class MSDeformAttnFunction(Function):
    """The autograd function around the two functions of an extension."""

    @staticmethod
    def forward(ctx, extension, value, shapes, starts, locations, weights, im2col_step):
        ctx.extension, ctx.im2col_step = extension, im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        value, locations, weights = ctx.extension.ms_deform_attn_backward(
            *ctx.saved_tensors, grad_output, ctx.im2col_step
        )
        return None, value, None, None, locations, weights, None


class DeformableModule(nn.Module):
    """Between the linear layers: masked value, locations, softmaxed weights. A subclass samples."""

    def __init__(self, channels, levels, heads, points):
        super().__init__()
        samples = heads * levels * points
        self.sampling_offsets = nn.Linear(channels, samples * 2)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def attend(self, query, reference_points, memory, shapes, starts, padding_mask, heads, levels, points):
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
        reference = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            locations = reference + offsets / shapes.flip(-1)[None, None, None, :, None]
        else:
            locations = reference[..., :2] + offsets / points * reference[..., 2:] * self.box_scale()
        value, weights = value.unflatten(-1, (heads, -1)), weights.unflatten(-1, (levels, points))
        return self.output_proj(self.sample(value, shapes, starts, locations, weights))

    def box_scale(self):
        return 0.5


class MSDeformAttn(DeformableModule):
    """The module of Deformable-DETR."""

    def __init__(self, d_model=256, n_levels=4, n_heads=8, n_points=4):
        super().__init__(d_model, n_levels, n_heads, n_points)
        self.im2col_step = 64
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
    ):
        return self.attend(
            query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask,
            self.n_heads, self.n_levels, self.n_points,
        )  # fmt: skip

    def sample(self, value, *arguments):
        return MSDeformAttnFunction.apply(sys.modules[EXTENSION], value, *arguments, self.im2col_step)


class MultiScaleDeformableAttention(DeformableModule):
    """The module of Relation-, Salience- and Dual-R-DETR; it looks up its sampler in its module, `BRICKS`."""

    def __init__(self, embed_dim=256, num_levels=4, num_heads=8, num_points=4, img2col_step=64):
        super().__init__(embed_dim, num_levels, num_heads, num_points)
        self.im2col_step = img2col_step
        self.embed_dim, self.num_levels, self.num_heads, self.num_points = embed_dim, num_levels, num_heads, num_points

    def forward(self, query, reference_points, value, spatial_shapes, level_start_index, key_padding_mask):
        return self.attend(
            query, reference_points, value, spatial_shapes, level_start_index, key_padding_mask,
            self.num_heads, self.num_levels, self.num_points,
        )  # fmt: skip

    def sample(self, value, shapes, starts, locations, weights):
        bindings = sys.modules[BRICKS]
        if bindings._C is not None:  # theirs also wants a CUDA tensor
            return MSDeformAttnFunction.apply(bindings._C, value, shapes, starts, locations, weights, self.im2col_step)
        return bindings.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def bricks_module(extension=None):
    """`models.bricks.ms_deform_attn`, and the packages that it lies in."""
    packages = {name: ModuleType(name) for name in ("models", "models.bricks")}
    for package in packages.values():
        package.__path__ = []
    bindings = ModuleType(BRICKS)
    bindings._C = extension

    def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        return grid_samples(value, value_spatial_shapes, sampling_locations, attention_weights)

    bindings.multi_scale_deformable_attn_pytorch = multi_scale_deformable_attn_pytorch
    bindings.MultiScaleDeformableAttention = MultiScaleDeformableAttention
    return packages | {BRICKS: bindings}


class QueryRouter(nn.Module):
    """The router of Dual-R-DETR: the bias [B H, N, N], equations of arXiv 2512.13876."""

    clamp = 5.0

    def __init__(self, embed_dim=256, router_rank=16, gate_rank=32, router_hidden=64, num_heads=8):
        super().__init__()
        self.router_rank, self.num_heads = router_rank, num_heads
        self.router_phi = nn.Sequential(
            nn.Linear(embed_dim, router_hidden), nn.GELU(), nn.Linear(router_hidden, router_rank)
        )
        for name in ("router_U_sup", "router_V_sup", "router_U_del", "router_V_del"):
            self.add_module(name, nn.Linear(router_rank, router_rank, bias=False))
        self.selector_a = nn.Linear(3, gate_rank, bias=False)
        self.selector_b = nn.Linear(3, gate_rank, bias=False)
        self.router_gamma_sup = nn.Parameter(torch.tensor(1.0))
        self.router_gamma_del = nn.Parameter(torch.tensor(1.0))

    def forward(self, query, similarity=None, confidence=None, geometry=None, return_gates=False):
        x = torch.stack([similarity, confidence, geometry], -1)
        suppressed = (self.selector_a(x) @ self.selector_b(x).mT).sigmoid()
        z = self.router_phi(query)
        products = {
            name: self.get_submodule(f"router_U_{name}")(z) @ self.get_submodule(f"router_V_{name}")(z).mT
            for name in ("sup", "del")
        }
        bias = (1 - suppressed) * F.softplus(self.router_gamma_del) * products["del"]
        bias = bias - suppressed * F.softplus(self.router_gamma_sup) * products["sup"]
        bias = (bias / math.sqrt(self.router_rank)).clamp(-self.clamp, self.clamp)
        return bias.repeat_interleave(self.num_heads, 0)


class DecoderLayer(nn.Module):
    """The layer of Dual-R-DETR: routed self-attention, then cross-attention and the feed-forward network."""

    def __init__(self, embed_dim=256, d_ffn=1024, n_heads=8, dropout=0.0, n_levels=4, n_points=4):
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, n_heads
        self.cross_attn = MultiScaleDeformableAttention(embed_dim, n_levels, n_heads, n_points)
        self.self_attn = nn.MultiheadAttention(embed_dim, n_heads, dropout=dropout, batch_first=True)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(embed_dim, d_ffn), nn.Linear(d_ffn, embed_dim)
        self.query_router = QueryRouter(embed_dim, num_heads=n_heads)

    @staticmethod
    def with_pos_embed(tensor, pos):
        return tensor if pos is None else tensor + pos

    def forward(
        self,
        query,
        query_pos,
        reference_points,
        value,
        spatial_shapes,
        level_start_index,
        self_attn_mask=None,
        key_padding_mask=None,
        gating_lambda=0.0,
        prev_class_logits=None,
        reference_boxes=None,
    ):
        placed = self.with_pos_embed(query, query_pos)
        mask = self_attn_mask
        if gating_lambda > 0:
            features = self.features(placed.detach(), prev_class_logits, reference_boxes)
            mask = gating_lambda * self.query_router(placed, *features)
            if self_attn_mask is not None:
                mask = mask + self_attn_mask.to(mask.dtype)  # a bool mask becomes 0 and 1
        attended = self.self_attn(query=placed, key=placed, value=query, attn_mask=mask, need_weights=False)[0]
        query = self.norm2(query + attended)
        attended = self.cross_attn(
            query=self.with_pos_embed(query, query_pos),
            reference_points=reference_points,
            value=value,
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            key_padding_mask=key_padding_mask,
        )
        query = self.norm1(query + attended)
        return self.norm3(query + self.linear2(self.linear1(query).relu()))

    @staticmethod
    def features(query, class_logits, boxes):
        """Similarity, confidence and geometry [B, N], by their definition."""
        unit = query / query.norm(dim=-1, keepdim=True)
        others = 1 - torch.eye(query.shape[1], dtype=query.dtype)
        similarity = ((unit @ unit.mT).relu() * others).mean(-1)
        zeros = torch.zeros_like(similarity)
        confidence = zeros if class_logits is None else class_logits.detach().softmax(-1).amax(-1)
        geometry = zeros if boxes is None else boxes.detach()[..., 2:].prod(-1).clamp(min=1e-6).log()
        return similarity, confidence, geometry


class Decoder(nn.Module):
    """The decoder of Dual-R-DETR: lambda is an attribute, and the last layers are routed."""

    def __init__(self, layers=3, classes=5, **layer):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(**layer) for _ in range(layers))
        channels = self.layers[0].embed_dim
        self.class_head = nn.ModuleList(nn.Linear(channels, classes) for _ in range(layers))
        self.gating_lambda, self.gating_last_n_layers = 0.0, 2

    def forward(
        self, query, query_pos, boxes, value, spatial_shapes, level_start_index, attn_mask=None, key_padding_mask=None
    ):
        logits = []
        for index, layer in enumerate(self.layers):
            routed = index >= len(self.layers) - self.gating_last_n_layers
            query = layer(
                query=query,
                query_pos=query_pos,
                reference_points=boxes[:, :, None].expand(-1, -1, len(spatial_shapes), -1),
                value=value,
                spatial_shapes=spatial_shapes,
                level_start_index=level_start_index,
                key_padding_mask=key_padding_mask,
                self_attn_mask=attn_mask,
                gating_lambda=self.gating_lambda if routed else 0.0,
                prev_class_logits=logits[-1] if logits else None,
                reference_boxes=boxes,
            )
            logits.append(self.class_head[index](query))
        return torch.stack(logits)
