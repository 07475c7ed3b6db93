"""The equations in order in plain PyTorch: the oracle of the tests and the `reference` backend.

A file an op, whose function of the same name is here too: this folder is the list of ops.
"""

import pkgutil
from importlib import import_module

from .routed_attention import routing_bias

OPS = tuple(file.name for file in pkgutil.iter_modules(__path__))
__all__ = ["OPS", "routing_bias", *OPS]

for _op in OPS:
    globals()[_op] = getattr(import_module(f"{__name__}.{_op}"), _op)
