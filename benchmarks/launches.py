"""Launches of the Triton kernels' host code, seen from outside: noted instead of run, or with other settings.

The context managers replace functions of `route_kernels.triton` in the whole process while they are open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from route_kernels.triton import block_sizes, launch
from route_kernels.triton.block_sizes import Settings


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class Recording:
    """Launches for an architecture that need not be here: noted, not run. Their tensors are on the meta device."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)
    entries: dict[str, int] = field(default_factory=dict)  # by kernel name: the place in its table that was looked up


@dataclass(frozen=True)
class Lookup:
    """A question that `block_sizes.config` was asked."""

    kernel_name: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]


_forced: dict[str, Settings] = {}  # by kernel name


@contextmanager
def recording(architecture: str) -> Iterator[Recording]:
    """Inside, block sizes are those of `architecture`, and launches are noted instead of run."""
    record = Recording(architecture)

    def settings(name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> Settings:
        if name in _forced:
            return _forced[name]
        record.entries[name], entry = block_sizes.entry(name, architecture, dtype, dict(sizes))
        return entry.settings

    def run(function: Any, grid: launch.Grid, *arguments: Any) -> None:
        if 0 not in grid.programs:
            record.launches.append(Launch(function, grid.programs, (*arguments, *grid.integers), grid.constants))

    with (
        mock.patch.object(block_sizes, "settings", settings),
        mock.patch.object(block_sizes, "architecture", lambda device: architecture),
        mock.patch.object(launch, "run", run),
        mock.patch.object(launch, "_plans", {}),
    ):
        yield record


@contextmanager
def forced(kernel_name: str, chosen: Settings) -> Iterator[None]:
    """Inside, every launch of the kernel has these settings; may be nested, for one kernel in another."""
    inner = block_sizes.settings

    def settings(name: str, *others: Any) -> Settings:
        return _forced[name] if name in _forced else inner(name, *others)

    with (
        mock.patch.dict(_forced, {kernel_name: chosen}),
        mock.patch.object(block_sizes, "settings", settings),
        mock.patch.object(launch, "_plans", {}),
    ):
        yield


@contextmanager
def lookups() -> Iterator[set[Lookup]]:
    """Inside, what block sizes are asked for is collected."""
    inner, found = block_sizes.settings, set()

    def settings(name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> Settings:
        found.add(Lookup(name, dtype, sizes))
        return inner(name, device, dtype, sizes)

    with mock.patch.object(block_sizes, "settings", settings), mock.patch.object(launch, "_plans", {}):
        yield found
