"""Time and peak memory of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..testing import tensors_in
from .target import Inputs


def step(model: nn.Module, inputs: Inputs) -> None:
    """Forward and backward of the loss, or of the sum of the outputs where there is none; gradients are dropped."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    loss_of(output).backward()
    model.zero_grad(set_to_none=True)


def loss_of(output: Any) -> torch.Tensor:
    """`output.loss` or `output["loss"]` if there is one, else the sum of every differentiable output.

    Raises:
        ValueError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        return loss
    sums = [x.float().sum() for _, x in tensors_in(output) if x.requires_grad]
    if not sums:
        raise ValueError("expected a loss or an output that requires a gradient, got none; is every parameter frozen?")
    return torch.stack(sums).sum()


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one run; a GPU is waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


MEASURED = {
    "cuda": "what PyTorch's allocator held at most beyond what it held before",
    "cpu": "the most that tensors and kernels' workspaces held, beyond what was held before (PyTorch's profiler)",
}


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that PyTorch's allocators held during one run, beyond what they held before it: see `MEASURED`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for size in _allocations(profile):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(profile: torch.profiler.profile) -> Iterator[int]:
    """Bytes of each allocation (positive) and release (negative), in their order."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
