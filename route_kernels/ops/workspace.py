"""Scratch memory of an op that is made of PyTorch's own operators: one tensor, in parts.

An op returns its workspace as one more output, so that fake tensors count what real ones take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ALIGNMENT = 512  # bytes, as PyTorch's CUDA allocator

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a part."""


def new_workspace(parts: Sequence[Part], like: torch.Tensor) -> torch.Tensor:
    """A tensor of bytes on the device of `like`, real or fake, that holds the parts."""
    return like.new_empty(sum(_padded_bytes(part) for part in parts), dtype=torch.uint8)


def parts_of(workspace: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """The parts as contiguous tensors, one after the other; what is between them becomes 0, as outputs repeat."""
    found, start = [], 0
    for shape, dtype in parts:
        end = start + math.prod(shape) * dtype.itemsize
        found.append(workspace[start:end].view(dtype).view(shape))
        start += _padded_bytes((shape, dtype))
        if end < start:
            workspace[end:start].zero_()
    return found


def _padded_bytes(part: Part) -> int:
    shape, dtype = part
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
