"""Modules that hold parameters and call the ops; no mathematics of their own.

Parameter names and shapes are those of the public modules, so their checkpoints load.
"""

from .add_layer_norm import AddLayerNorm
from .attention import MSDeformAttn, RoutedSelfAttention
from .feed_forward import FeedForward
from .matching import BoxTargets, HungarianMatcher, Matches, pack_targets
from .router import QueryRouter, routing_factors
from .set_criterion import PredictionSet, SetCriterion

__all__ = [
    "AddLayerNorm",
    "BoxTargets",
    "FeedForward",
    "HungarianMatcher",
    "MSDeformAttn",
    "Matches",
    "PredictionSet",
    "QueryRouter",
    "RoutedSelfAttention",
    "SetCriterion",
    "pack_targets",
    "routing_factors",
]
