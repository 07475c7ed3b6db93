"""One file an op: what tests and benchmarks need beyond its kernels, found by the op's name.

Each module declares

    arguments(*, batch, queries, ..., dtype, device, seed)    a call, scaled as a detector's is
    samples(dtype, **sizes)     by label, calls that together reach every argument; `sizes` go to `arguments`
    SHAPES                      by label, sizes for `arguments` at which kernels may break
    GRADCHECK                   sizes small enough for finite differences
    EMPTY                       by dimension, a call in which it has size 0
    BAD_INPUTS                  calls that break the contract, and the one error of each

an op of which a query gives the same whatever the others are

    PER_QUERY                   by argument, and of "output", the dimension of the queries

an op whose arguments may differ in dtype

    MIXED                       options for `arguments` by which they do

an op with numbers among its arguments also

    NUMBERS                     by argument, a number other than its default; a 0-dim tensor does as well

and an op with kernels of its own, as sizes for `arguments`,

    SMALL_SHAPES                SHAPES for the interpreters, which are slow and take small tiles
    SUMMED_BY_ATOMICS           results that need not be bitwise the same twice but in PyTorch's deterministic mode
    TINY                        for checks in Triton's interpreter
    DETECTOR                    of a decoder; the queries vary
    OF_WORKERS                  work for several workers, and too few elements for several of PyTorch's own threads
    MANY, MANY_GIGABYTES        more than 2^31 elements in the largest tensor, more images than a grid has rows; and
                                the GPU memory that it takes
    FLOAT32_UNDER_AUTOCAST      True where the output does not get the autocast dtype
    FLOP_OF_AN_ELEMENT          of an op without products: an argument or "output", operations on each of its elements
                                forward and backward
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__))


def declaration(op: str) -> ModuleType:
    """The declarations of a public op.

    Raises:
        ModuleNotFoundError: it has none: whoever adds an op adds a file here.
    """
    return import_module(f"{__name__}.{op}")
