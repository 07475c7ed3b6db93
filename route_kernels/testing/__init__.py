"""Sample inputs, bad inputs, the tolerance policy and training steps: what tests and benchmarks share."""

from ..doctor.training_step import counted_calls, perturb_sampling, relative_errors, tensors_in, training_step
from .accuracy import assert_as_accurate, check_accuracy, errors, outcome, root_mean_square
from .arguments import Arguments, call, converted, map_tensors, named_tensors
from .bad_inputs import BAD_INPUTS, BadInput
from .eager import EAGER, grid_sampled, under_eager
from .samples import (
    add_layer_norm_arguments,
    add_linear_arguments,
    feed_forward_arguments,
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    query_similarity_arguments,
    routed_attention_arguments,
    sample_arguments,
    sigmoid_focal_loss_arguments,
)

__all__ = [
    "BAD_INPUTS",
    "EAGER",
    "Arguments",
    "BadInput",
    "add_layer_norm_arguments",
    "add_linear_arguments",
    "assert_as_accurate",
    "call",
    "check_accuracy",
    "converted",
    "counted_calls",
    "errors",
    "feed_forward_arguments",
    "grid_sampled",
    "map_tensors",
    "ms_deform_attn_arguments",
    "ms_deform_attn_fused_arguments",
    "named_tensors",
    "outcome",
    "perturb_sampling",
    "query_similarity_arguments",
    "relative_errors",
    "root_mean_square",
    "routed_attention_arguments",
    "sample_arguments",
    "sigmoid_focal_loss_arguments",
    "tensors_in",
    "training_step",
    "under_eager",
]
