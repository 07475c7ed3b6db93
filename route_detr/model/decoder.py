"""Deformable decoder with iterative box refinement and, in training, a routed auxiliary branch (arXiv 2512.13876).

Branches share every weight. The main branch has plain self-attention; the auxiliary branch adds lambda(t) B to the
self-attention logits of the routed layers. Two exact identities save work (dropout is 0): layers before the first
routed one give both branches the same result and run once; after it the branches are packed side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import route_kernels as rk
from route_kernels.nn import QueryRouter, RoutedSelfAttention

from .blocks import Blocks, PredictionHead, SineEmbedding, mlp
from .denoising import group_similarity
from .structures import Memory, Predictions, Queries, RouteType, Routing, side_by_side

if TYPE_CHECKING:
    from ..config import DetectorConfig

MIN_AREA = 1e-6  # of a reference box, before the logarithm


def attend_to_the_confident(attention: RoutedSelfAttention, x: Tensor, position: Tensor, confidence: Tensor) -> Tensor:
    """Queries x, position [B, N, C] attend to themselves and those of higher confidence [B, N] (arXiv 2605.23507)."""
    order = confidence.argsort(dim=1, descending=True, stable=True)[..., None]
    ranges = torch.zeros(order.shape[1], 2, 2, dtype=torch.int32, device=x.device)
    ranges[:, 0, 1] = torch.arange(1, len(ranges) + 1, device=x.device)  # of its rank: [0, rank]
    attended = attention(x.take_along_dim(order, 1), position.take_along_dim(order, 1), key_ranges=ranges)
    return attended.take_along_dim(order.argsort(1), 1)


class DecoderLayer(nn.Module):
    """Self-attention among the queries of a branch, deformable cross-attention to the memory, feed-forward."""

    def __init__(self, config: DetectorConfig, causal: bool) -> None:
        super().__init__()
        blocks, self.causal = Blocks(config), causal
        self.self_attention = blocks.self_attention()
        self.self_norm = blocks.norm()
        self.cross_attention = blocks.deformable_attention(in_encoder=False)
        self.cross_norm = blocks.norm()
        self.ffn = blocks.feed_forward()
        self.ffn_norm = blocks.norm()

    def forward(self, queries: Queries, memory: Memory, routing: rk.RoutingFactors | None, keep_main: bool) -> Tensor:
        """Content [B, G, N, C] -> [B, G', N, C]: a routed layer that keeps the main branch forks, G' = 2."""
        content, position, ranges = queries.content, queries.position.expand_as(queries.content), queries.key_ranges
        if self.causal:
            inputs = (each.flatten(0, 1) for each in (content, position, queries.confidence))
            attended = attend_to_the_confident(self.self_attention, *inputs).unflatten(0, content.shape[:2])
        elif routing is None:
            ranges = None if ranges is None else ranges.repeat_interleave(content.shape[1], 0)
            attended = self.self_attention(content.flatten(0, 1), position.flatten(0, 1), key_ranges=ranges)
            attended = attended.unflatten(0, content.shape[:2])
        else:
            attended = self.self_attention(content[:, -1], position[:, -1], routing, key_ranges=ranges)[:, None]
            if keep_main:
                main = self.self_attention(content[:, 0], position[:, 0], key_ranges=ranges)
                attended = torch.stack([main, attended[:, 0]], 1)
        x = self.self_norm(attended, content.expand_as(attended))
        # All branches side by side on the query axis: the value is projected once.
        attended = self.cross_attention(
            (x + queries.position).flatten(1, 2),
            memory.sampling_reference(queries.boxes.expand(*x.shape[:3], 4).flatten(1, 2)),
            memory.features,
            memory.spatial_shapes,
            padding_mask=memory.padding,
        )
        x = self.cross_norm(attended.unflatten(1, x.shape[1:3]), x)
        return self.ffn_norm(self.ffn(x), x)


class Decoder(nn.Module):
    """Queries -> one `Predictions` a layer."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.embed_dim, 1 if config.share_heads else config.decoder_layers
        causal = (0 < config.causal_from <= index for index in range(config.decoder_layers))
        self.layers = nn.ModuleList(DecoderLayer(config, each) for each in causal)
        self.heads = nn.ModuleList(PredictionHead(dim, config.num_classes) for _ in range(heads))
        self.mask_head = mlp(dim, dim, dim, dim) if config.masks else None
        self.norm = nn.LayerNorm(dim) if config.decoder_norm else None
        self.anchor = mlp(2 * dim, dim, dim) if config.query_position != "proposal" else None
        self.anchor_scale = mlp(dim, dim, dim) if config.query_position == "scaled_anchor" else None
        self.sine = SineEmbedding(dim // 2)
        form = {"rank": config.router_rank, "limit": config.router_limit, "nonnegative": config.router_nonnegative}
        with torch.random.fork_rng([]):  # a router begins alike whichever others there are, and shifts nobody's numbers
            routers = [QueryRouter(dim, **form) for _ in self.layers][::-1]  # drawn from the last layer's on
        self.routers = nn.ModuleDict({str(index): routers[index] for index in config.routed_layer_indices})
        self.routers.requires_grad_(not config.router_frozen)

    def forward(self, queries: Queries, memory: Memory, routing: Routing | None = None) -> list[Predictions]:
        """Main branch alone (routing None), or both: boxes [B, G, N, 4], G = 1 where the branches are one."""
        if routing is None or self.config.branches == "packed":
            return [predictions for _, predictions in self.steps(queries, memory, routing)]
        main = self.forward(queries, memory)
        aux = [predictions for _, predictions in self.steps(queries, memory, routing, keep_main=False)]
        return [side_by_side(pair) for pair in zip(main, aux, strict=True)]

    def steps(
        self, queries: Queries, memory: Memory, routing: Routing | None = None, keep_main: bool = True
    ) -> Iterator[tuple[Queries, Predictions]]:
        """The queries that enter each layer, and its predictions."""
        for index, layer in enumerate(self.layers):
            if self.anchor is not None:
                position = self.anchor(self.sine(queries.boxes))
                if self.anchor_scale is not None and index > 0:
                    position = position * self.anchor_scale(queries.content)  # DAB, arXiv 2201.12329
                queries = queries._replace(position=position)
            factors = None
            if routing is not None and routing.active[index]:
                factors = self.routing(index, queries, routing.strengths[index], routing.route_type)
            content = layer(queries, memory, factors, keep_main)
            head = self.heads[min(index, len(self.heads) - 1)]
            features = content if self.norm is None else self.norm(content)
            logits, box_logits = head(features, queries.box_logits if queries.attached is None else queries.attached)
            masks = None if self.mask_head is None else self.mask_head(features + queries.position)
            boxes = box_logits.sigmoid()
            yield queries, Predictions(logits, boxes, masks)
            if index + 1 < len(self.layers):
                if self.norm is not None:  # DINO refines the reference by the content before the norm
                    box_logits = head.refined(content, queries.box_logits)
                    boxes = box_logits.detach().sigmoid()
                queries = queries._replace(
                    content=content,
                    box_logits=box_logits.detach(),
                    boxes=boxes.detach(),
                    logits=logits.detach(),
                    attached=box_logits if self.config.look_forward_twice else None,
                )

    def routing(
        self, index: int, queries: Queries, strength: Tensor | float, route_type: RouteType
    ) -> rk.RoutingFactors:
        """Factors of the bias of routed layer `index` for the auxiliary (last) branch of `queries`; strength: lambda.

        One route type alone takes the place of the other too: p r + (1 - p) r = r, and the gate has no gradient. Rows
        of queries that are not to be routed are zero.
        """
        content, known = queries.content[:, -1], queries.denoising
        matching, noisy = content.detach().tensor_split([queries.matching], 1)
        similarity = rk.query_similarity(matching)
        if known is not None:
            similarity = torch.cat([similarity, group_similarity(noisy, known)], 1)
        factors = self.routers[str(index)](
            content + queries.position[:, -1],
            similarity=similarity,
            confidence=queries.confidence[:, -1],
            geometry=queries.boxes[:, -1, :, 2:].prod(-1).clamp_min(MIN_AREA).log(),
            strength=strength,
        )
        if known is not None and self.config.routed_queries != "both":
            denoising = torch.arange(content.shape[1], device=content.device) >= queries.matching
            routed = (denoising if self.config.routed_queries == "denoising" else ~denoising)[:, None]
            factors = factors._replace(sup_q=factors.sup_q * routed, del_q=factors.del_q * routed)
        if route_type == "suppressor":
            return factors._replace(del_q=factors.sup_q, del_k=factors.sup_k)
        if route_type == "delegator":
            return factors._replace(sup_q=factors.del_q, sup_k=factors.del_k)
        return factors
