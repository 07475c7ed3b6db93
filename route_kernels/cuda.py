"""Whether the CUDA kernels can run here, and why not. They are compiled when the package is built, by nvcc."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import torch

from . import native
from .graphs import constant_in_graphs
from .precision import FLOATING

OPS = ("ms_deform_attn", "ms_deform_attn_fused")
"""The ops that have CUDA kernels."""

OLDEST_CAPABILITY = (8, 0)


def can_run(op: str, *tensors: torch.Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel of `op` takes these tensors, and the reason; without any, whether it could run here."""
    if op not in OPS:
        return False, f"this version has no cuda kernel for {op}"
    if native.cuda_load_error is not None:
        return False, native.cuda_load_error
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return False, f"the cuda kernel takes CUDA tensors, got one on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in FLOATING:
            return False, f"the cuda kernel takes float16, bfloat16, float32 and float64, got {tensor.dtype}"
    for device in {tensor.device.index for tensor in tensors} or {None}:
        obstacle = _obstacle(device)
        if obstacle:
            return False, obstacle
    return True, _description()


@constant_in_graphs
def _description() -> str:
    return f"CUDA kernel, {native.cuda_build()}"


@constant_in_graphs
def _obstacle(device: int | None) -> str:
    """Why no CUDA kernel runs on this GPU, None for the current one; "" where they do."""
    return _known_obstacle(device)


@functools.cache
def _known_obstacle(device: int | None) -> str:
    if not torch.cuda.is_available():
        return "the cuda kernels take CUDA tensors, and PyTorch finds no GPU here"
    capability = torch.cuda.get_device_capability(device)
    name = ".".join(map(str, capability))
    if capability < OLDEST_CAPABILITY:
        return f"the cuda kernels need compute capability 8.0 or newer, this GPU has {name}"
    targets, compiler = native.cuda_build().split(", ")
    if not has_code_for(capability, targets.split()):
        return (
            f"the cuda kernels were built for {targets}, this GPU has compute capability {name}; "
            f"set TORCH_CUDA_ARCH_LIST={name} and install again"
        )
    newest, needed = native.cuda_driver(), int(re.search(r"\d+", compiler)[0])
    if newest[0] < needed:
        return (
            f"the cuda kernels were built by {compiler}, this GPU's driver runs CUDA {newest[0]}.{newest[1]}; "
            "update the driver, or install again with a CUDA toolkit that is not newer"
        )
    return ""


def has_code_for(capability: tuple[int, int], targets: Iterable[str]) -> bool:
    """Whether a GPU of this compute capability runs machine code (sm_90) or PTX (compute_90) of one of the targets.

    Machine code runs on its major version from its minor on, PTX on everything newer; both on nothing else where it is
    specific to an architecture (sm_90a), and on no other major version where to a family (sm_100f). CUDA C++
    Programming Guide, compatibility of binaries and PTX.
    """
    for target in targets:
        kind, major, minor, suffix = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", target).groups()
        built = (int(major), int(minor))
        if capability == built:
            return True
        same_major = capability[0] == built[0]
        if suffix != "a" and capability > built and (same_major or (kind == "compute" and not suffix)):
            return True
    return False
