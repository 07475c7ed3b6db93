"""Loads the native kernels (`torch.ops.route_kernels_native`), the CPU's and CUDA's, or says why they are not there."""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_C.abi3.so"
CUDA_LIBRARY = Path(__file__).parent / "_C_cuda.abi3.so"
INSTALL = "pip install --no-build-isolation -e ."


def _load() -> str | None:
    if not LIBRARY.exists():
        return (
            "the native library was not built (no C++ compiler at installation, or the package runs from an unbuilt "
            f"source tree); run `{INSTALL}`"
        )
    return _obstacle_of_loading(LIBRARY, "native")


def _load_cuda() -> str | None:
    """After the CPU's library, which has the schemas."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA"
    if load_error is not None:
        return load_error
    if not CUDA_LIBRARY.exists():
        return (
            "this build has no CUDA kernels (no nvcc, or a PyTorch without CUDA, at installation); with both, run "
            f"`{INSTALL}`"
        )
    return _obstacle_of_loading(CUDA_LIBRARY, "CUDA")


def _obstacle_of_loading(library: Path, name: str) -> str | None:
    try:
        torch.ops.load_library(os.fspath(library))
    except (OSError, RuntimeError) as error:
        return f"the {name} library could not be loaded: {error}"
    return None


load_error: str | None = _load()
cuda_load_error: str | None = _load_cuda()


def simd_level() -> str | None:
    """The SIMD level that the kernels use on this machine (`baseline`, `avx2`, `avx512`, `neon`), or None unbuilt."""
    return None if load_error is not None else torch.ops.route_kernels_native.simd_level()


def cuda_build() -> str | None:
    """Targets and compiler of the CUDA kernels, "sm_80 sm_90 compute_90, nvcc 13.0", or None where not loaded."""
    return None if cuda_load_error is not None else torch.ops.route_kernels_native.cuda_build()


def cuda_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, (13, 0); (0, 0) without a driver, None where the kernels are not loaded."""
    if cuda_load_error is not None:
        return None
    version = torch.ops.route_kernels_native.cuda_driver()
    return version // 1000, version % 1000 // 10
