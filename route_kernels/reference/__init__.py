"""The equations in order in plain PyTorch: the oracle of the tests and the `reference` backend."""

from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .query_similarity import query_similarity
from .routed_attention import routed_attention, routing_bias

__all__ = ["ms_deform_attn", "ms_deform_attn_fused", "query_similarity", "routed_attention", "routing_bias"]
