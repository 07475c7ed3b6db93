"""What nvcc makes of the CUDA kernels, for chips that need not be here: registers, spills and instructions of each.

Compiled exactly as setup.py compiles them, and once for their content: what was compiled before lies in build/cubins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from .device import ROOT
from .machine_code import MachineCode, nvidia_machine_code

ARCHITECTURES = {"sm80": "80", "sm90": "90a", "sm100": "100a"}
"""By the chips of the static report."""

CUBINS = ROOT / "build" / "cubins"
SOURCE = "csrc/ms_deform_attn/cuda.cu"
THREADS = 256  # of a block
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
    command = [*build().device_command(SOURCE, storage, [(f"compute_{number}", f"sm_{number}")]), "-cubin"]
    content = hashlib.sha256(repr((command, build().nvcc_says("--version"))).encode())
    for path in sorted([SOURCE, *build().CUDA_HEADERS]):
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
    """ "_ZN2rk6deform14deform_forwardILNS_5DTypeE3ELi8ELi4ELi1EEEv..." -> ("deform_forward", (8, 4, 1))."""
    name, arguments = re.search(r"\d+(deform_[a-z]+)I(.*?)EEv", symbol).groups()
    return name, tuple(int(number) for number in re.findall(r"Li(\d+)E?", arguments))
