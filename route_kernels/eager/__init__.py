"""The ops as PyTorch users write them, in PyTorch's own operators: backend `eager`, the baseline of every figure.

Arguments are those of `reference`. Unlike it, nothing is upcast, autocast does what it does to any PyTorch code, and
attention is `scaled_dot_product_attention` or `grid_sample`. Corners (NaN locations, masks that hide every key) are
left to those operators.

A file an op, whose function of the same name is here too.
"""

import pkgutil
from importlib import import_module

__all__ = [file.name for file in pkgutil.iter_modules(__path__)]

for _op in __all__:
    globals()[_op] = getattr(import_module(f"{__name__}.{_op}"), _op)
