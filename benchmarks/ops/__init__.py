"""One file an op: what is measured of it, and the least work that it is measured against, found by the op's name.

Each module declares

    cases(device)               rows of speed (`registry.Case`) on "cpu" or "cuda"
    GPU_SECONDS                 seconds that a report on a GPU would spend on it: more valuable ops come first
    is_gpu_headline(case)          whether a case is one whose kernels are profiled
    COUNTED                     by name, least work and headline sizes (`work.Counted`)
    sizes_of(arguments)         of a call, by the names of the op's docstring
    main_and_factor(arguments)  a tensor of the main dtype, and one of the factors, locations or offsets
    TUNED                       by name, sizes that detectors have: what the tuner tries
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from route_kernels.backends import OPS as NAMES


def declaration(op: str) -> ModuleType:
    """The declarations of an op with kernels.

    Raises:
        ModuleNotFoundError: it has none: whoever adds an op adds a file here.
    """
    return import_module(f"{__name__}.{op}")


__all__ = ["NAMES", "declaration"]
