"""Which dtypes there are, and in which of them sums are taken."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device; None where it is off, and for meta tensors, which have none."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off inside; nothing at all where it is not on, so that exported graphs hold nothing for it."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
