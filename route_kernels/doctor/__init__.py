"""`route-kernels doctor your.module:build_model`: do our ops work in this model, and what do they save?

A training step (forward, loss or sum, backward) with the model's own code and with ours, on the same weights and
inputs: agreement of outputs and of every parameter's gradient, calls, time and peak memory.
"""

from .agreement import AGREE, DIFFER, UNANSWERED
from .diagnosis import diagnose
from .target import UsageError

__all__ = ["AGREE", "DIFFER", "UNANSWERED", "UsageError", "diagnose"]
