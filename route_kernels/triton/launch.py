"""What a launch of a kernel is made of: its settings for a device, dtype and shape, and the call itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from . import block_sizes
from .availability import interpreted
from .block_sizes import INTERPRETER, TABLE, Entry

Settings = Mapping[str, int]  # BLOCK_..., num_warps, num_stages


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as a `Prepared` made it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    entries: frozenset[tuple[str, int]]  # (kernel name, place in its table) looked up for it


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


MOST_PLANS = 4096
Plan = TypeVar("Plan")

_plans: dict[tuple[Any, ...], Any] = {}
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
    found = None if where == INTERPRETER else block_sizes.tuned_settings(kernel_name, device, dtype, dict(sizes))
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


class Prepared:
    """A launch but for its tensors and floats: `Prepared(kernel, grid, *integers, **settings)(tensors, *floats)`.

    A kernel's parameters come in this order: tensors (or None), floats, integers, constants. For each launch Triton
    finds out how the arguments specialize a kernel: that they are 1, or multiples of 16. On the host it takes 20 us for
    50 of them. Here what it found is kept, for tensors of the same alignments; their dtypes are what `kept` knows.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *integers: int, **settings: Any) -> None:
        self.kernel, self.grid, self.integers, self.settings = kernel, grid, integers, settings
        self._empty = 0 in grid
        self.entries = frozenset() if _recording is None else frozenset(_recording.entries)
        if _recording is not None:
            _recording.entries.clear()
        self._runners: dict[tuple[Any, ...], tuple[Callable, tuple[Any, ...]]] = {}  # by device and alignments

    def __call__(self, tensors: Sequence[torch.Tensor | None], *floats: float) -> None:
        """Launches on the device of the first tensor and its current stream; a grid with a 0 in it nothing."""
        if self._empty:
            return
        arguments = (*tensors, *floats, *self.integers)
        if _recording is not None:
            _recording.launches.append(Launch(self.kernel, self.grid, arguments, self.settings, self.entries))
            return
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(device.index, tensors, arguments)
        else:
            self._run(device.index, tensors, arguments)

    def _run(self, device: int | None, tensors: Sequence[torch.Tensor | None], arguments: tuple[Any, ...]) -> None:
        if not _finds_again():
            self.kernel.run(*arguments, grid=self.grid, warmup=False, **self.settings)
            return
        seen = (device, *[None if tensor is None else tensor.data_ptr() % 16 for tensor in tensors])
        found = self._runners.get(seen)
        if found is not None:
            run, constants = found
            run(*arguments, *constants)
            return
        compiled = self.kernel.run(*arguments, grid=self.grid, warmup=False, **self.settings)
        if compiled is not None:  # else a hook of Triton's took the launch
            names = [parameter.name for parameter in self.kernel.params[len(arguments) :]]
            self._runners[seen] = compiled[(*self.grid, 1, 1)], tuple(self.settings[name] for name in names)


def kept(make: Callable[..., Plan], tensors: Sequence[torch.Tensor | None], *others: Any) -> Plan:
    """`make(tensors, *others)`: what an op launches, made once for tensors of these shapes, strides and dtypes.

    others: all else that it depends on, hashable. What `make` returns must not hold on to the tensors.
    """
    if _recording is not None or _forced or _lookups is not None:
        return make(tensors, *others)
    known = [None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    seen = (make, tensors[0].device, others, *known)
    plan = _plans.get(seen)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[seen] = make(tensors, *others)
    return plan


@functools.cache
def _finds_again() -> bool:
    """NVIDIA only: on AMD GPUs a tensor's size specializes a kernel, too."""
    return not interpreted() and torch.version.hip is None


def contiguous_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor; `x.new_empty(x.shape)` takes twice as long on the host."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
