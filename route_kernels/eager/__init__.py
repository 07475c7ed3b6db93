"""The ops as PyTorch users write them, in PyTorch's own operators: backend `eager`, the baseline of every figure.

Arguments are those of `reference`. Unlike it, nothing is upcast, autocast does what it does to any PyTorch code, and
attention is `scaled_dot_product_attention` or `grid_sample`. Corners (NaN locations, masks that hide every key) are
left to those operators.
"""

from .add_layer_norm import add_layer_norm
from .add_linear import add_linear
from .feed_forward import feed_forward
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .query_similarity import query_similarity
from .routed_attention import routed_attention
from .sigmoid_focal_loss import sigmoid_focal_loss

__all__ = [
    "add_layer_norm",
    "add_linear",
    "feed_forward",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "query_similarity",
    "routed_attention",
    "sigmoid_focal_loss",
]
