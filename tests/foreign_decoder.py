"""A small decoder of somebody else's, with nn.MultiheadAttention, and routers in it that matter."""

import torch
from torch import nn

import route_kernels as rk
from route_kernels.integrations import add_routing

BATCH, QUERIES, CHANNELS, HEADS = 2, 7, 24, 4
ROUTED = {"routed_attention": 2, "query_similarity": 2}  # calls of a model with two routed layers


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Layer(nn.Module):
    """The self-attention half of a research DETR's decoder layer."""

    def __init__(self, **options):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(CHANNELS, HEADS, dropout=0.0, **options)
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, content, position, masks):
        positioned = content + position
        if not self.self_attn.batch_first:
            content, positioned = content.transpose(0, 1), positioned.transpose(0, 1)
        attended = self.self_attn(positioned, positioned, content, **masks)[0]
        if not self.self_attn.batch_first:
            content, attended = content.transpose(0, 1), attended.transpose(0, 1)
        return self.norm(content + attended)


def run(layer, *arguments):
    return layer(*arguments)


class Model(nn.Module):
    """Layers that `run` calls; a checkpoint, in a test."""

    def __init__(self, layers=2, **options):
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(**options) for _ in range(layers))
        self.run = run

    def forward(self, content, position, **masks):
        for layer in self.decoder.layers:
            content = self.run(layer, content, position, masks)
        return content


def model(dtype=torch.float64, **options):
    torch.manual_seed(1)
    built = Model(**options).to(dtype)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built


def inputs(dtype=torch.float64, **masks):
    content, position = normal(BATCH, QUERIES, CHANNELS, dtype=dtype), normal(BATCH, QUERIES, CHANNELS, seed=1)
    return {"content": content.requires_grad_(), "position": position.to(dtype).requires_grad_(), **masks}


def features():
    return {"confidence": normal(BATCH, QUERIES, seed=2).sigmoid(), "geometry": normal(BATCH, QUERIES, seed=3)}


def with_random_routers(built, **options):
    """A bias of every size, some beyond a limit of 1."""
    added = add_routing(built, verbose=False, rank=4, hidden_dim=8, gate_rank=5, **{"limit": 1.0, **options})
    torch.manual_seed(2)
    for router in added.routers.values():
        for parameter in router.parameters():
            nn.init.normal_(parameter, std=0.7)
    return added


def routed(built, settings=None, **call):
    with rk.routing(**(settings or {})):
        return built(**call)


def bias_of(router, content, positioned, settings):
    """[B, N, N], written out."""
    similarity = rk.query_similarity(content.detach())
    factors = router(positioned, similarity=similarity, **{"strength": 1.0, **settings})
    return rk.routing_bias(factors)


def biased_forward(built, settings, content, position, attn_mask=None, key_padding_mask=None, sign=1.0):
    """The original modules of `built`, each given its router's bias as an additive attn_mask [B H, N, N]."""
    for layer in built.decoder.layers:
        bias = sign * bias_of(layer.self_attn.router, content, content + position, settings)
        added = bias[:, None].expand(-1, HEADS, -1, -1)
        if attn_mask is not None:
            mask = _numbers(attn_mask)
            added = added + (mask if mask.dim() == 2 else mask.view(BATCH, HEADS, QUERIES, QUERIES))
        if key_padding_mask is not None:
            added = added + _numbers(key_padding_mask).view(BATCH, 1, 1, QUERIES)
        content = layer(content, position, {"attn_mask": added.flatten(0, 1), "need_weights": False})
    return content


def _numbers(mask):
    """A mask of nn.MultiheadAttention, as what is added: -inf where a bool mask is True."""
    return torch.where(mask, -torch.inf, 0.0).double() if mask.dtype == torch.bool else mask
