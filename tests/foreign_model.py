"""A small foreign model: deformable attention in plain PyTorch, looked up in this module as other codebases do."""

import sys

import torch
from torch import nn

import route_kernels as rk
from route_kernels.integrations.codebase import applying
from route_kernels.testing import grid_sampled

LEVELS = ((5, 7), (3, 4))
HEADS, POINTS = 2, 3


def deformable_attention(value, shapes, locations, weights):
    return grid_sampled(value, shapes, None, locations, weights)


class Layer(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        samples = HEADS * len(LEVELS) * POINTS
        self.sampling_offsets = nn.Linear(channels, 2 * samples)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.unused = nn.Linear(2, 2)

    def forward(self, query, memory):
        value = self.value_proj(memory).unflatten(-1, (HEADS, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, len(LEVELS), POINTS, 2))
        weights = self.attention_weights(query).unflatten(-1, (HEADS, -1)).softmax(-1)
        weights = weights.unflatten(-1, (len(LEVELS), POINTS))
        return query + deformable_attention(value, LEVELS, 0.5 + 0.1 * offsets, weights)


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, query, memory):
        for layer in self.layers:
            query = layer(query, memory)
        return {"hidden": query, "of_each_query": [query.sum(-1), query.argmax(-1)]}


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    positions = sum(height * width for height, width in LEVELS)
    query, memory = (
        torch.randn(2, length, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for length in (6, positions)
    )
    return {"query": query, "memory": memory}


def apply(attend=lambda value, shapes, *points: rk.ms_deform_attn(value, shapes, None, *points)):
    """An integration of this very module."""
    owner = sys.modules[__name__]
    with applying("foreign_model", verbose=False) as report:
        report.replace(owner, "deformable_attention", attend, name="deformable_attention", op="ms_deform_attn")
    return report
