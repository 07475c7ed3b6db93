"""Fused training kernels for DETR-family detectors: routed attention and multi-scale deformable attention."""

from . import integrations
from .backends import (
    BackendUnavailableError,
    available_backends,
    backend,
    can_run,
    requested_backend,
    set_backend,
)
from .integrations.routing.context import routing
from .ops.add_layer_norm import add_layer_norm
from .ops.add_linear import add_linear
from .ops.box_loss import box_loss
from .ops.feed_forward import feed_forward
from .ops.matching_cost import matching_cost
from .ops.ms_deform_attn import ms_deform_attn
from .ops.ms_deform_attn_fused import ms_deform_attn_fused
from .ops.query_similarity import query_similarity
from .ops.routed_attention import RoutingFactors, routed_attention, routing_bias
from .ops.sigmoid_focal_loss import sigmoid_focal_loss
from .recompute import recomputed

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "RoutingFactors",
    "add_layer_norm",
    "add_linear",
    "available_backends",
    "backend",
    "box_loss",
    "can_run",
    "feed_forward",
    "integrations",
    "matching_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "query_similarity",
    "recomputed",
    "requested_backend",
    "routed_attention",
    "routing",
    "routing_bias",
    "set_backend",
    "sigmoid_focal_loss",
]
