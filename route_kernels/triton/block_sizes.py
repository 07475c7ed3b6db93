"""Block sizes, warps and pipeline stages of every kernel, by architecture, dtype and size: the one place to tune.

The first entry that fits is taken, so each kernel's entries end with one that fits everything. `route-kernels tune`
measures the entries of all architectures on the GPU at hand, and what it writes goes before this table:
`$ROUTE_KERNELS_TUNED` names the file; else it is `route-kernels/tuned-<GPU>.json` in the user's cache directory
(`$XDG_CACHE_HOME` or `~/.cache`). A file of another version, Triton or architecture is left alone, with a warning.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .availability import interpreted

ARCHITECTURES = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942")
"""sm86 is every Ampere and Ada with 100 KiB of shared memory (8.6, 8.9), gfx942 every AMD GPU."""

INTERPRETER = "interpreter"

Settings = Mapping[str, int]  # BLOCK_..., num_warps, num_stages

FORMAT = 1  # of the file of tuned settings
VARIABLE = "ROUTE_KERNELS_TUNED"
Rows = dict[str, dict[str, int]]  # {key: settings}

FULL = (torch.float32,)
HALF = (torch.float16, torch.bfloat16)
DOUBLE = (torch.float64,)

NVIDIA = ("sm80", "sm86", "sm90", "sm100", "sm120")
AMD = ("gfx942",)
MMA2 = ("sm80", "sm86", "sm120")
"""Tensor cores whose operands lie in registers."""


@dataclass(frozen=True)
class Entry:
    """`settings` for launches that fit: any of `architectures`, any of `dtypes`, each named size at most its bound."""

    settings: Mapping[str, int]
    architectures: tuple[str, ...] | None = None  # None is every one
    dtypes: tuple[torch.dtype, ...] | None = None
    at_most: Mapping[str, int] = field(default_factory=dict)

    def fits(self, architecture: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> bool:
        return (
            (self.architectures is None or architecture in self.architectures)
            and (self.dtypes is None or dtype in self.dtypes)
            and all(sizes[name] <= bound for name, bound in self.at_most.items())
        )


def _tile(num_warps: int, num_stages: int, **blocks: int) -> dict[str, int]:
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def _attention(block_n: int, block_m: int, heads: int, num_warps: int = 4, num_stages: int = 2) -> dict[str, int]:
    return _tile(num_warps, num_stages, BLOCK_N=block_n, BLOCK_M=block_m, HEADS_PER_PROGRAM=heads)


TABLE: dict[str, tuple[Entry, ...]] = {
    "query_inverse_norms": (
        Entry(_tile(4, 1, BLOCK_N=16, BLOCK_C=16), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_N=16, BLOCK_C=256)),
    ),
    # ODD is 1 where rows are not 16 elements apart: they are read element by element.
    "query_similarity_relu": (
        Entry(_tile(4, 1, BLOCK_N=16, BLOCK_C=16), architectures=(INTERPRETER,)),
        Entry(_tile(4, 2, BLOCK_N=64, BLOCK_C=32), architectures=("gfx942",), dtypes=FULL),
        Entry(_tile(4, 2, BLOCK_N=64, BLOCK_C=16), architectures=("sm100",), dtypes=FULL, at_most={"ODD": 0}),
        Entry(_tile(8, 2, BLOCK_N=64, BLOCK_C=16), architectures=NVIDIA, dtypes=FULL, at_most={"ODD": 0}),
        Entry(_tile(8, 2, BLOCK_N=32, BLOCK_C=16), dtypes=FULL),
        Entry(_tile(4, 1, BLOCK_N=64, BLOCK_C=256), ("gfx942",), at_most={"ODD": 0, "C": 256}),
        Entry(_tile(4, 3, BLOCK_N=64, BLOCK_C=64), ("sm86", "sm120"), at_most={"ODD": 0}),
        Entry(_tile(4, 2, BLOCK_N=64, BLOCK_C=256), at_most={"ODD": 0, "C": 256}),
        Entry(_tile(4, 3, BLOCK_N=64, BLOCK_C=64), at_most={"ODD": 0}),
        Entry(_tile(8, 2, BLOCK_N=64, BLOCK_C=32)),
    ),
    # R is the widest rank (0: plain), MASKED 2 with a mask and 1 without, F the bytes of a factor's element. A program
    # has as many heads as spill no register: on sm90, D 32, forward takes 15 instructions a pair and head with 4, 27
    # with one.
    "routed_attention_forward": (
        Entry(_attention(16, 16, 2), architectures=(INTERPRETER,)),
        Entry(_attention(64, 64, 1), NVIDIA, HALF, {"D": 64, "R": 0, "MASKED": 1}),
        Entry(_attention(64, 32, 4), ("sm90", "sm100"), HALF, {"D": 32, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(64, 64, 2), ("sm90", "sm100"), HALF, {"D": 64, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(64, 64, 2), MMA2, HALF, {"D": 32, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(64, 32, 2), MMA2, HALF, {"D": 64, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(64, 32, 1), NVIDIA, HALF, {"D": 64, "R": 16}),
        Entry(_attention(64, 32, 1), dtypes=HALF, at_most={"R": 16, "MASKED": 1}),
        Entry(_attention(64, 32, 1), ("sm80", "sm90", "sm100"), HALF, {"R": 16}),
        Entry(_attention(64, 16, 1), dtypes=HALF, at_most={"MASKED": 1}),
        Entry(_attention(16, 16, 1), ("sm120",), HALF, {"D": 16}),
        Entry(_attention(64, 16, 1), dtypes=HALF, at_most={"D": 64}),
        Entry(_attention(32, 16, 1, num_warps=8), ("sm86", "sm120"), HALF),
        Entry(_attention(64, 16, 1), dtypes=HALF),
        Entry(_attention(64, 32, 1), NVIDIA, FULL, {"D": 32, "R": 16, "MASKED": 1}),
        Entry(_attention(32, 16, 1), ("sm80", "sm90", "sm100", "sm120"), FULL, {"D": 64, "R": 16}),
        Entry(_attention(32, 16, 1, num_warps=8), NVIDIA, FULL),
        Entry(_attention(32, 16, 1), AMD, FULL, {"D": 64}),
        Entry(_attention(16, 16, 1)),
    ),
    "routed_attention_backward_queries": (
        Entry(_attention(16, 16, 2), architectures=(INTERPRETER,)),
        Entry(_attention(64, 32, 2), NVIDIA, HALF, {"D": 32, "R": 0, "MASKED": 1}),
        Entry(_attention(64, 16, 4), dtypes=HALF, at_most={"D": 16, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(64, 16, 4), ("sm80", "sm100"), HALF, {"D": 32, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(64, 16, 2), dtypes=HALF, at_most={"D": 64, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(64, 16, 1), NVIDIA, HALF, {"D": 64, "R": 32}),
        Entry(_attention(64, 16, 1), NVIDIA, HALF, {"D": 64, "MASKED": 1}),
        Entry(_attention(64, 16, 1), ("sm80", "sm86", "sm90"), HALF, {"R": 32}),
        Entry(_attention(64, 16, 1, num_warps=8), ("sm90",), HALF),
        Entry(_attention(64, 16, 1), ("sm100",), HALF),
        Entry(_attention(16, 16, 1), NVIDIA, HALF),
        Entry(_attention(64, 16, 1, num_stages=1), AMD, HALF),
        Entry(_attention(32, 32, 1), NVIDIA, FULL, {"D": 64, "R": 16, "MASKED": 1}),
        Entry(_attention(32, 16, 1, num_stages=1), ("sm80",), FULL, {"D": 64, "R": 16}),
        Entry(_attention(32, 16, 1), AMD, FULL, {"MASKED": 1}),
        Entry(_attention(32, 16, 1, num_stages=1), AMD, FULL),
        Entry(_attention(32, 16, 1, num_warps=8), ("sm86",), FULL, {"MASKED": 1}),
        Entry(_attention(32, 16, 1, num_warps=8), ("sm80", "sm86"), FULL, {"D": 16}),
        Entry(_attention(32, 16, 1), ("sm80", "sm86"), FULL, {"D": 64, "R": 32}),
        Entry(_attention(32, 16, 1), ("sm80",), FULL, {"R": 32}),
        Entry(_attention(32, 16, 1, num_warps=8), ("sm80", "sm86"), FULL),
        Entry(_attention(32, 16, 1)),
    ),
    "routed_attention_backward_keys": (
        Entry(_attention(16, 16, 2), architectures=(INTERPRETER,)),
        Entry(_attention(32, 64, 2), NVIDIA, HALF, {"D": 32, "R": 0, "MASKED": 1}),
        Entry(_attention(16, 64, 4), ("sm90", "sm100"), HALF, {"D": 16, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(16, 64, 2), ("sm90", "sm100"), HALF, {"D": 32, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(32, 64, 1), ("sm80", "sm86"), HALF, {"D": 32, "R": 16, "MASKED": 1, "F": 2}),
        Entry(_attention(16, 64, 1), ("sm80", "sm90", "sm100", "sm120"), HALF, {"D": 64, "R": 16}),
        Entry(_attention(16, 64, 1), ("sm80", "sm86", "sm90", "sm100"), HALF, {"R": 16, "MASKED": 1}),
        Entry(_attention(16, 64, 1, num_warps=8), ("sm100",), HALF, {"R": 16}),
        # Rows of 128 in the registers of every warp leave room for no more.
        Entry(_attention(16, 16, 1, num_warps=8), ("sm120",), HALF, {"R": 16}),
        Entry(_attention(16, 64, 1, num_warps=8), ("sm86",), HALF, {"D": 64, "R": 16}),
        Entry(_attention(16, 64, 1, num_warps=8), ("sm90",), HALF, {"R": 32}),
        Entry(_attention(16, 64, 1, num_warps=8), ("sm80", "sm100"), HALF, {"D": 64, "R": 32}),
        Entry(_attention(16, 64, 1, num_warps=8), ("sm120",), HALF, {"D": 32, "R": 32}),
        Entry(_attention(16, 64, 1, num_stages=1), ("sm100",), HALF, {"R": 32}),
        Entry(_attention(16, 16, 1, num_warps=8), ("sm120",), HALF, {"D": 64, "R": 32}),
        Entry(_attention(16, 16, 1), ("sm86",), HALF, {"D": 64}),
        Entry(_attention(16, 16, 1), ("sm80", "sm86", "sm120"), HALF, {"R": 32}),
        Entry(_attention(32, 16, 1), NVIDIA, HALF),
        Entry(_attention(16, 64, 1, num_stages=1), AMD, HALF, {"MASKED": 1}),
        Entry(_attention(16, 16, 1, num_warps=1, num_stages=1), AMD, HALF, {"R": 16}),
        Entry(_attention(16, 16, 1, num_warps=1, num_stages=1), AMD, HALF, {"D": 32, "R": 32}),
        Entry(_attention(16, 16, 1, num_warps=2, num_stages=1), AMD, HALF, {"D": 32}),
        Entry(_attention(16, 64, 1, num_warps=2, num_stages=1), AMD, HALF, {"D": 64}),
        Entry(_attention(16, 32, 1, num_warps=2, num_stages=1), AMD, HALF),
        Entry(_attention(16, 32, 1), AMD, FULL, {"MASKED": 1}),
        Entry(_attention(16, 32, 1, num_warps=1, num_stages=1), AMD, FULL, {"D": 16}),
        Entry(_attention(16, 32, 1, num_stages=1), AMD, FULL, {"D": 32, "R": 16}),
        Entry(_attention(16, 16, 1, num_warps=1, num_stages=1), AMD, FULL, {"D": 64, "R": 32}),
        Entry(_attention(16, 64, 1, num_stages=1), AMD, FULL, {"D": 64}),
        Entry(_attention(16, 32, 1, num_stages=1), AMD, FULL),
        Entry(_attention(16, 32, 1), NVIDIA, FULL, {"D": 64, "R": 16}),
        Entry(_attention(16, 32, 1), ("sm80", "sm86"), FULL, {"R": 32}),
        Entry(_attention(16, 32, 1), ("sm100",), FULL, {"D": 64}),
        Entry(_attention(16, 32, 1), ("sm100",), FULL, {"R": 16}),
        Entry(_attention(16, 16, 1, num_warps=8), ("sm100",), FULL),
        Entry(_attention(16, 32, 1, num_warps=8)),
    ),
    # a row of value is read 16 bytes a thread, by the threads of one warp: nothing to exchange, no barrier
    "ms_deform_attn_forward": (
        Entry(_tile(4, 1, BLOCK_BYTES=1024, UNROLL=1), architectures=(INTERPRETER,)),
        Entry(_tile(1, 1, BLOCK_BYTES=512, UNROLL=1), dtypes=DOUBLE),
        Entry(_tile(1, 1, BLOCK_BYTES=1024, UNROLL=2), architectures=("gfx942",)),
        Entry(_tile(1, 1, BLOCK_BYTES=512, UNROLL=4), at_most={"rows": 65536}),  # too few warps to hide latency
        Entry(_tile(1, 1, BLOCK_BYTES=512, UNROLL=2)),
    ),
    "ms_deform_attn_backward": (
        Entry(_tile(4, 1, BLOCK_BYTES=1024, UNROLL=1), architectures=(INTERPRETER,)),
        Entry(_tile(1, 1, BLOCK_BYTES=1024, UNROLL=1), architectures=("gfx942",), dtypes=(*FULL, *DOUBLE)),
        Entry(_tile(1, 1, BLOCK_BYTES=256, UNROLL=1), architectures=("sm86",), dtypes=HALF),
        Entry(_tile(1, 1, BLOCK_BYTES=512, UNROLL=1)),
    ),
    "ms_deform_attn_gather": (
        Entry(_tile(1, 1, BLOCK_T=4), architectures=(INTERPRETER,)),
        Entry(_tile(1, 1, BLOCK_T=16)),
    ),
    # BLOCK_TC: tokens times channels of a tile
    "add_layer_norm_forward": (
        Entry(_tile(4, 1, BLOCK_TC=256), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_TC=2048)),
    ),
    "add_layer_norm_backward": (
        Entry(_tile(4, 1, BLOCK_TC=256), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_TC=1024), dtypes=DOUBLE),
        Entry(_tile(4, 1, BLOCK_TC=2048)),
    ),
    # BLOCK_TK: queries times classes of a tile
    "sigmoid_focal_loss_forward": (
        Entry(_tile(4, 1, BLOCK_TK=128), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_TK=256), dtypes=DOUBLE),
        Entry(_tile(4, 1, BLOCK_TK=1024)),
    ),
    "sigmoid_focal_loss_backward": (
        Entry(_tile(4, 1, BLOCK_TK=128), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_TK=1024)),
    ),
    "matching_cost_forward": (
        Entry(_tile(4, 1, BLOCK_N=16), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_N=128), dtypes=DOUBLE),
        Entry(_tile(4, 1, BLOCK_N=256)),
    ),
    "box_loss_forward": (
        Entry(_tile(4, 1, BLOCK_M=16), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_M=128)),
    ),
    "box_loss_backward": (
        Entry(_tile(4, 1, BLOCK_M=16), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_M=128)),
    ),
    "softmax_adjoint": (
        Entry(_tile(4, 1, BLOCK_NK=128), architectures=(INTERPRETER,)),
        Entry(_tile(4, 1, BLOCK_NK=256), dtypes=DOUBLE),
        Entry(_tile(4, 1, BLOCK_NK=1024)),
    ),
}


def config(kernel_name: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> Settings:
    """The settings of a launch, by dtype and sizes: tuned ones for this GPU come before those of the table.

    Do not change the mapping that comes back: it is kept.

    Raises:
        LookupError: the table has no entry that fits.
    """
    return settings(kernel_name, device, dtype, tuple(sizes.items()))


@functools.lru_cache(maxsize=4096)
def settings(kernel_name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]):
    """`config`, kept."""
    where = architecture(device)
    found = None if where == INTERPRETER else tuned_settings(kernel_name, device, dtype, dict(sizes))
    return entry(kernel_name, where, dtype, dict(sizes))[1].settings if found is None else found


def entry(kernel_name: str, where: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> tuple[int, Entry]:
    """The first entry of the table that fits, and its place."""
    for place, found in enumerate(TABLE[kernel_name]):
        if found.fits(where, dtype, sizes):
            return place, found
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


def bucket(size: int) -> int:
    """The power of two at or above: shapes of one bucket share their settings."""
    return 1 << max(size - 1, 0).bit_length()


def tuned_key(kernel_name: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """ "routed_attention_forward bfloat16 D=32 N=2048": sizes in buckets."""
    named = [f"{name}={bucket(size)}" for name, size in sorted(sizes.items())]
    return " ".join([kernel_name, str(dtype).removeprefix("torch."), *named])


def tuned_path(device: torch.device) -> Path:
    """Where the settings of this GPU are kept."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache / "route-kernels" / f"tuned-{name}.json"


def circumstances(device: torch.device) -> dict[str, Any]:
    """Versions and devices that must be the same for settings to be used again."""
    import triton

    from .. import __version__

    return {
        "format": FORMAT,
        "route-kernels": __version__,
        "triton": triton.__version__,
        "gpu": torch.cuda.get_device_name(device),
    }


def tuned_settings(
    kernel_name: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]
) -> dict[str, int] | None:
    """The tuned settings of a launch on this GPU, or None."""
    rows = _rows_of(device)
    return rows.get(tuned_key(kernel_name, dtype, sizes)) if rows else None


@functools.cache
def _rows_of(device: torch.device) -> Rows:
    file = tuned_path(device)
    return read_tuned(file, circumstances(device)) if file.exists() else {}


def read_tuned(file: Path, expected: Mapping[str, Any]) -> Rows:
    """The rows of a cache file; none, with a warning, where it is not of these circumstances or cannot be read."""
    again = "run `route-kernels tune` again or delete it"
    try:
        content = json.loads(file.read_text())
        found, rows = content["circumstances"], content["rows"]
        differences = [f"{name} {found.get(name)}, now {value}" for name, value in expected.items()
                       if found.get(name) != value]  # fmt: skip
        valid = all(isinstance(value, int) for row in rows.values() for value in row.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{file}: cannot be read ({error!r}) and is ignored; {again}", stacklevel=2)
        return {}
    if differences or not valid:
        reason = "; ".join(differences) or "settings that are no integers"
        warnings.warn(f"{file}: ignored: {reason}; {again}", stacklevel=2)
        return {}
    return rows
