"""The public formulation of dual-branch training, on our detector's weights: what `memory --public` plans.

The same losses and gradients to rounding (a test), other tensors kept for backward: attention with every
intermediate written out, sampled by an op that keeps value, locations and weights in float32, as the public CUDA op
does; the decoder run twice; the feed-forward's ReLU in place, on a view; every class scored in the first stage; one-hot
focal losses, one layer of one branch at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from route_detr.config import DetectorConfig
from route_detr.model.criterion import Criterion
from route_detr.model.detector import Detector
from route_detr.model.structures import DetectorOutput, Predictions
from route_kernels.backends import assumed
from route_kernels.nn import FeedForward, MSDeformAttn, PredictionSet, RoutedSelfAttention, pack_targets
from route_kernels.ops.ms_deform_attn import ms_deform_attn
from route_kernels.ops.routed_attention import RoutingFactors
from route_kernels.reference.routed_attention import routing_bias, visible_keys


def public_config(config: DetectorConfig) -> DetectorConfig:
    """The same detector with the decoder run twice, every class in the first stage, and nothing recomputed."""
    return dataclasses.replace(config, branches="two_pass", proposal_classes="all", memory="none")


def make_public(detector: Detector, backend: str | None = None) -> None:
    """Change the forwards of a detector of `public_config`, in place; its parameters stay.

    backend: assumed of the sampling op (`route_kernels.backends.assumed`), for fake tensors.
    """

    def sampled(*arguments: Tensor) -> Tensor:
        with nullcontext() if backend is None else assumed(backend):
            return ms_deform_attn(*arguments)

    for module in detector.modules():
        if isinstance(module, MSDeformAttn):
            module.forward = partial(_deformable_attention, module, sampled)
        elif isinstance(module, RoutedSelfAttention):
            module.forward = partial(_self_attention, module)
        elif isinstance(module, FeedForward):
            module.forward = partial(_feed_forward, module)


def _deformable_attention(
    self: MSDeformAttn,
    sample: Callable[..., Tensor],
    query: Tensor,  # [B, N, C]
    reference_points: Tensor,  # [B, N, L or 1, 2 or 4]
    memory: Tensor,  # [B, S, C]
    spatial_shapes: Sequence[tuple[int, int]],
    padding_mask: Tensor | None = None,  # [B, S]
    query_pos: Tensor | None = None,  # [B or 1, N, C]
) -> Tensor:
    query = query if query_pos is None else query + query_pos
    value, points = self.value_proj(memory), self.num_points
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None], 0.0)
    offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, -1, points, 2))
    weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
    reference = reference_points[:, :, None, :, None]  # [B, N, 1, L or 1, 1, 2 or 4]
    if reference.shape[-1] == 2:
        sizes = reference.new_tensor([(width, height) for height, width in spatial_shapes])
        locations = reference + offsets / sizes[:, None]
    else:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    precise = torch.promote_types(value.dtype, torch.float32)
    heads = value.unflatten(-1, (self.num_heads, -1)).to(precise)
    with torch.autocast(value.device.type, enabled=False):
        weights = weights.to(precise).unflatten(-1, (-1, points))
        sampled = sample(heads, spatial_shapes, None, locations.to(precise), weights)
    return self.output_proj(sampled.to(value.dtype))


def _self_attention(
    self: RoutedSelfAttention,
    query: Tensor,  # [B, N, C]
    query_pos: Tensor | None = None,  # [B, N, C]
    routing: RoutingFactors | None = None,
    *,
    key_ranges: Tensor | None = None,  # [B, N, 2, 2]
) -> Tensor:
    """`nn.MultiheadAttention` with the bias, and what a query may not see, as one additive mask [B H, N, N]."""
    mask = None if routing is None else routing_bias(routing).repeat_interleave(self.num_heads, 0)
    if key_ranges is not None:
        hidden = ~visible_keys(key_ranges, query.shape[1]).repeat_interleave(self.num_heads, 0)
        mask = (query.new_zeros(hidden.shape) if mask is None else mask).masked_fill(hidden, -torch.inf)
    placed = (query if query_pos is None else query + query_pos).transpose(0, 1)
    attended, _ = functional.multi_head_attention_forward(
        placed, placed, query.transpose(0, 1), self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias,
        None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias, need_weights=False, attn_mask=mask,
    )  # fmt: skip
    return attended.transpose(0, 1)


def _feed_forward(self: FeedForward, x: Tensor) -> Tensor:
    return self[2](functional.relu(self[0](x), inplace=True))


class PublicCriterion(Criterion):
    """The same total, one layer of one branch at a time, as PyTorch users write it (backend `eager`)."""

    def __call__(self, output: DetectorOutput, targets: Sequence) -> dict[str, Tensor]:
        """{"loss": the total of `Criterion`}, without the parts; ValueError for a detector with masks."""
        if output.pixel_embeddings is not None:
            raise ValueError("masks: expected False for the public formulation, which has none, got True")
        boxes, losses = output.proposals.boxes, []
        packed = pack_targets(targets, boxes.device, boxes.dtype, output.logits.shape[-1])
        known = None if output.denoising is None else output.denoising.targets
        with assumed("eager"):
            for name, row, weight in _rows([output.proposals, *output.layers], output.aux_weight):
                ((rows, matches),) = self.boxes.matched([PredictionSet([name], *row[:2])], packed)
                losses.append(weight * self.boxes.losses(rows, packed, matches)[1].sum())
            for name, row, weight in _rows(output.denoising.layers if known else [], output.aux_weight):
                target = known.target.masked_fill(~known.positive, -1)
                rows = PredictionSet([name], *row[:2], None, target, known.present)
                losses.append(weight / known.groups * self.boxes.losses(rows, packed, None)[1].sum())
        return {"loss": sum(losses) / max(sum(packed.counts), 1)}


def _rows(layers: Sequence[Predictions], aux_weight: Tensor) -> Iterator[tuple[str, Predictions, Tensor | float]]:
    """Each layer of each branch: its name, predictions with G = 1 and weight."""
    for index, layer in enumerate(layers):
        for branch in range(layer.boxes.shape[1]):
            one = Predictions(layer.logits[:, branch, None], layer.boxes[:, branch, None])
            yield f"{index}.{branch}", one, aux_weight if branch else 1.0
