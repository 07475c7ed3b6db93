"""Sample inputs, bad inputs and the tolerance policy: what tests and benchmarks of the ops share."""

from .accuracy import assert_as_accurate, check_accuracy, errors, outcome, root_mean_square
from .arguments import Arguments, call, converted, map_tensors, named_tensors
from .bad_inputs import BAD_INPUTS, BadInput
from .eager import EAGER
from .samples import (
    ms_deform_attn_arguments,
    ms_deform_attn_fused_arguments,
    query_similarity_arguments,
    routed_attention_arguments,
    sample_arguments,
)

__all__ = [
    "BAD_INPUTS",
    "EAGER",
    "Arguments",
    "BadInput",
    "assert_as_accurate",
    "call",
    "check_accuracy",
    "converted",
    "errors",
    "map_tensors",
    "ms_deform_attn_arguments",
    "ms_deform_attn_fused_arguments",
    "named_tensors",
    "outcome",
    "query_similarity_arguments",
    "root_mean_square",
    "routed_attention_arguments",
    "sample_arguments",
]
