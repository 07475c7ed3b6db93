"""Loads the native kernels (`torch.ops.route_kernels_native`) if they were built, and says why if they were not."""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_C.abi3.so"


def _load() -> str | None:
    if not LIBRARY.exists():
        return (
            "the native library was not built (no C++ compiler at installation, or the package runs from an unbuilt "
            "source tree); run `pip install --no-build-isolation -e .`"
        )
    try:
        torch.ops.load_library(os.fspath(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the native library could not be loaded: {error}"
    return None


load_error: str | None = _load()


def simd_level() -> str | None:
    """The SIMD level that the kernels use on this machine (`baseline`, `avx2`, `avx512`, `neon`), or None unbuilt."""
    return None if load_error is not None else torch.ops.route_kernels_native.simd_level()
