"""The equations in order in plain PyTorch: the oracle of the tests and the `reference` backend."""

from .add_layer_norm import add_layer_norm
from .add_linear import add_linear
from .feed_forward import feed_forward
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .query_similarity import query_similarity
from .routed_attention import routed_attention, routing_bias
from .sigmoid_focal_loss import sigmoid_focal_loss

__all__ = [
    "add_layer_norm",
    "add_linear",
    "feed_forward",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "query_similarity",
    "routed_attention",
    "routing_bias",
    "sigmoid_focal_loss",
]
