"""What a launch of a kernel is made of: its settings for a device, dtype and shape, and the call itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import tuned
from .availability import interpreted
from .table import INTERPRETER, TABLE, Entry

Settings = Mapping[str, int]  # BLOCK_..., num_warps, num_stages


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as `launch` got it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    entries: frozenset[tuple[str, int]]  # (kernel name, place in its table) looked up since the launch before


@dataclass
class Recording:
    """Launches for an architecture that need not be here: noted, not run. Of tensors on the meta device."""

    architecture: str
    launches: list[Launch] = field(default_factory=list)
    entries: set[tuple[str, int]] = field(default_factory=set)  # for the next launch


@dataclass(frozen=True)
class Lookup:
    """What `config` was asked."""

    kernel_name: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]


MOST_COMPILED = 4096
_PLAIN = frozenset((int, float, bool, str, tuple, type(None)))

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # kernel and constants by all that specializes it
_recording: Recording | None = None
_forced: Mapping[str, Settings] = {}  # by kernel name
_lookups: set[Lookup] | None = None


def config(kernel_name: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> Settings:
    """The settings of a launch: `kernel[grid](..., **config("name", x.device, x.dtype, N=N, D=D))`.

    Tuned ones for this GPU come before those of the table. Do not change the mapping that comes back: it is kept.

    Raises:
        LookupError: the table has no entry that fits.
    """
    if _lookups is not None:
        _lookups.add(Lookup(kernel_name, dtype, tuple(sizes.items())))
    if kernel_name in _forced:
        return _forced[kernel_name]
    if _recording is not None:
        place, entry = _entry(kernel_name, _recording.architecture, dtype, sizes)
        _recording.entries.add((kernel_name, place))
        return entry.settings
    return _settings(kernel_name, device, dtype, tuple(sizes.items()))


@functools.lru_cache(maxsize=4096)
def _settings(kernel_name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]):
    where = architecture(device)
    found = None if where == INTERPRETER else tuned.settings(kernel_name, device, dtype, dict(sizes))
    return _entry(kernel_name, where, dtype, dict(sizes))[1].settings if found is None else found


def _entry(kernel_name: str, where: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> tuple[int, Entry]:
    for place, entry in enumerate(TABLE[kernel_name]):
        if entry.fits(where, dtype, sizes):
            return place, entry
    raise LookupError(f"{kernel_name}: no entry of the table fits {where}, {dtype}, {dict(sizes)}")


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for what runs kernels on tensors of `device`: "sm90", "gfx942", "interpreter", ..."""
    if interpreted():
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm80" if minor == 0 else "sm86"
    return {9: "sm90", 10: "sm100", 12: "sm120"}.get(major, "sm100" if major > 9 else "sm80")


def target(device: torch.device) -> str:
    """`architecture`, or while launches are recorded the one that they are recorded for."""
    return architecture(device) if _recording is None else _recording.architecture


def input_precision() -> str:
    """Of `tl.dot` between float32 tiles: "tf32" only where PyTorch's own products may use it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """`kernel[grid](*arguments, **settings)` on the device of the first argument (a tensor) and its current stream.

    A grid with a 0 in it launches nothing.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, settings, frozenset(_recording.entries)))
        _recording.entries.clear()
        return
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, grid, arguments, settings, device.index)
    else:
        _run(kernel, grid, arguments, settings, device.index)


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], settings: dict[str, Any], device: int | None):
    """`kernel[grid](*arguments, **settings)` on the current device.

    For each launch Triton finds out how the arguments specialize a kernel: that they are 1, or multiples of 16. On the
    host it takes 20 us for 50 of them. Here what it found is kept, for arguments of the same types, alignments and
    values.
    """
    if not _finds_again():
        kernel.run(*arguments, grid=grid, warmup=False, **settings)
        return
    kinds = [x if x.__class__ in _PLAIN else (x.dtype, x.data_ptr() % 16) for x in arguments]
    seen = (id(kernel), device, *settings.values(), *kinds)
    found = _compiled.get(seen)
    if found is None:
        compiled = kernel.run(*arguments, grid=grid, warmup=False, **settings)
        if compiled is None:  # a hook of Triton's took the launch
            return
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        constants = [parameter.name for parameter in kernel.params[len(arguments) :]]
        _compiled[seen] = compiled, tuple(settings[name] for name in constants)
    else:
        compiled, constants = found
        compiled[(*grid, 1, 1)](*arguments, *constants)


@functools.cache
def _finds_again() -> bool:
    """NVIDIA only: on AMD GPUs a tensor's size specializes a kernel, too."""
    return not interpreted() and torch.version.hip is None


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`; `triton.cdiv` takes ten times as long on the host."""
    return -(-size // block)


def padded(width: int) -> int:
    """The power of two, from 16, that `tl.dot` takes for `width` channels."""
    return 1 << max(width - 1, 15).bit_length()


@contextmanager
def recording(architecture: str) -> Iterator[Recording]:
    """Inside, `config` answers for `architecture` and `launch` notes its calls instead of running them."""
    global _recording
    outer, _recording = _recording, Recording(architecture)
    try:
        yield _recording
    finally:
        _recording = outer


@contextmanager
def forced(kernel_name: str, settings: Settings) -> Iterator[None]:
    """Inside, `config` gives these settings to every launch of the kernel; may be nested, for one kernel in another."""
    global _forced
    outer, _forced = _forced, {**_forced, kernel_name: settings}
    try:
        yield
    finally:
        _forced = outer


@contextmanager
def lookups() -> Iterator[set[Lookup]]:
    """Inside, what `config` is asked is collected."""
    global _lookups
    outer, _lookups = _lookups, set()
    try:
        yield _lookups
    finally:
        _lookups = outer
