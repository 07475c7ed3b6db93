"""Registers, spills and instructions of each CUDA kernel as nvcc compiles it, for chips that need not be here.

Compiled exactly as setup.py compiles them, and once for their content: what was compiled before lies in build/cubins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from .device import ROOT
from .machine_code import MachineCode, Row, counts, nvidia_machine_code

ARCHITECTURES = {"sm80": "80", "sm86": "86", "sm90": "90a", "sm100": "100a", "sm120": "120a"}
"""By the chips of the static report."""

CUBINS = ROOT / "build" / "cubins"
SOURCE = "csrc/ms_deform_attn/cuda.cu"
WARPS = {"deform_forward": 8, "deform_backward": 4, "deform_gather": 8}  # of a block
OP = "ms_deform_attn"  # and the fused op, by the same kernels
DIRECTIONS = {"deform_forward": "forward", "deform_backward": "backward", "deform_gather": "backward"}


@dataclass(frozen=True)
class Kernel:
    """One instantiation for one chip: `deform_forward<storage, 8, 4, 1>` has arguments (8, 4, 1)."""

    name: str
    storage: str
    arguments: tuple[int, ...]
    chip: str
    code: MachineCode

    def __str__(self) -> str:
        return f"{self.name} {self.storage} {' '.join(map(str, self.arguments))}"


@cache
def build() -> ModuleType:
    """setup.py, which says how the kernels are compiled."""
    spec = importlib.util.spec_from_file_location("setup_of_route_kernels", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cubin(storage: str, chip: str) -> Path:
    """The kernels that store `storage`, in machine code of `chip`.

    Raises:
        subprocess.CalledProcessError: nvcc refuses them; its output says why.
    """
    number = ARCHITECTURES[chip]
    objects = build().cuda_objects([(f"compute_{number}", f"sm_{number}")], [])
    (command,) = (
        [*command, source, "-cubin"] for kind, source, command in objects if (kind, source) == (storage, SOURCE)
    )
    content = hashlib.sha256(repr((command, subprocess.check_output([build().nvcc(), "--version"]))).encode())
    for path in sorted([SOURCE, *build().sources("*.h"), *build().sources("*.cuh")]):
        content.update((ROOT / path).read_bytes())
    made = CUBINS / f"{storage}-{chip}-{content.hexdigest()[:24]}.cubin"
    if not made.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, check=True, capture_output=True, text=True)
        os.replace(unfinished, made)
    return made


def kernels(storage: str, chip: str) -> Iterator[Kernel]:
    """Every kernel of a storage type, as that chip runs it."""
    for symbol, code in sorted(nvidia_machine_code(cubin(storage, chip)).items()):
        name, arguments = _instantiation(symbol)
        yield Kernel(name, storage, arguments, chip, code)


def _instantiation(symbol: str) -> tuple[str, tuple[int, ...]]:
    """ "_ZN2rk14ms_deform_attn14deform_forwardILNS_5DTypeE3ELi8ELi4ELi1EEEv..." -> ("deform_forward", (8, 4, 1))."""
    name, arguments = re.search(r"\d+(deform_[a-z]+)I(.*?)EEv", symbol).groups()
    return name, tuple(int(number) for number in re.findall(r"Li(\d+)E?", arguments))


def rows(chips: Iterable[str], matching: str = "", few: bool = False) -> Iterator[Row]:
    """Rows of the static report: kernels whose name has `matching` in it; with `few` those that store bfloat16."""
    if build().nvcc() is None:
        print("no CUDA kernels in this report: there is no nvcc", file=sys.stderr)
        return
    for chip in filter(ARCHITECTURES.__contains__, chips):
        for storage in ("bfloat16",) if few else build().STORAGE_TYPES:
            yield from (row for row in map(_row, kernels(storage, chip)) if matching in row.variant)


def _row(kernel: Kernel) -> Row:
    return Row(
        op=OP,
        direction=DIRECTIONS[kernel.name],
        variant=f"cuda {kernel.name} {kernel.storage}",
        chip=kernel.chip,
        blocks=dict(zip(("VEC", "LANES", "VECTORS"), kernel.arguments, strict=False)),
        num_warps=WARPS[kernel.name],
        num_stages=1,
        shared_bytes=0,  # what backward asks for depends on the points, and is too little to decide
        tensor_memory_columns=0,
        tile_bytes={"loaded_once": 0, "loaded_in_loops": 0, "stored_once": 0, "stored_in_loops": 0},
        entries=[],
        **counts(kernel.code, kernel.chip, 0, WARPS[kernel.name]),
    )
