"""Modules that hold parameters and call the ops; no mathematics of their own.

Parameter names and shapes are those of the public modules, so their checkpoints load.
"""

from .add_layer_norm import AddLayerNorm
from .attention import MSDeformAttn, RoutedSelfAttention
from .feed_forward import FeedForward
from .router import QueryRouter, routing_factors

__all__ = ["AddLayerNorm", "FeedForward", "MSDeformAttn", "QueryRouter", "RoutedSelfAttention", "routing_factors"]
