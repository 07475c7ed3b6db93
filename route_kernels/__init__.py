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
from .integrations.routing_context import routing
from .ops.ms_deform_attn import ms_deform_attn
from .ops.ms_deform_attn_fused import ms_deform_attn_fused
from .ops.query_similarity import query_similarity
from .ops.routed_attention import RoutingFactors, routed_attention, routing_bias

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "RoutingFactors",
    "available_backends",
    "backend",
    "can_run",
    "integrations",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "query_similarity",
    "requested_backend",
    "routed_attention",
    "routing",
    "routing_bias",
    "set_backend",
]
