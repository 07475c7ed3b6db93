"""How much of a call on a CPU is its kernel: `python -m benchmarks kernel-time`.

The native library is compiled once more, with a clock around each kernel, as a Python module (pybind11) that takes the
place of the one that ships: what a call takes beyond its kernels is Python, autograd, the dispatcher and memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest import mock

import pybind11
import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "kernel_time"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def compiled() -> Path:
    """The module; the kernels are those of setup.py, compiled again only where they changed."""
    build = [sys.executable, "setup.py", "build_ext", "--build-temp", FOLDER, "--build-lib", FOLDER / "library"]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "ROUTE_KERNELS_CUDA": "0"}, check=True)
    includes = [*include_paths(), sysconfig.get_path("include"), pybind11.get_include()]
    first = [ROOT / "benchmarks" / "kernel_time.h", *sorted(ROOT.glob("csrc/*/op.cpp"))]
    kernels = [*FOLDER.glob("*/csrc/*/cpu.cpp.o"), *FOLDER.glob("*/csrc/common/*.o")]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10", "-lpthread"]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *(f"-I{path}" for path in includes)]
    for path in first:
        command += ["-include", path]
    made = FOLDER / "kernel_time.so"
    subprocess.run([*command, ROOT / "csrc" / "registration.cpp", *kernels, *libraries, "-o", made], check=True)
    return made


def in_place_of_the_library(module: Path) -> Callable[[], float]:
    """Has route_kernels, not imported yet, use the module; returns what takes the seconds in kernels since the last."""
    specification = importlib.util.spec_from_file_location("kernel_time", module)
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)  # registers the ops
    with mock.patch.object(torch.ops, "load_library"):
        importlib.import_module("route_kernels")
    return loaded.take_seconds


def rows(op: str | None, repeat: int, take_seconds: Callable[[], float]) -> Iterator[tuple[str, str, float, float]]:
    """Op, case, and the medians of a call and of its kernels, in microseconds."""
    from route_kernels.testing import named_tensors

    from .registry import cases

    for case in cases("cpu"):
        if op not in (None, case.op):
            continue
        arguments = case.make_arguments()
        leaves = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]
        times = []
        for _ in range(repeat):
            take_seconds()
            started = perf_counter()
            output = case.contenders[0].call(**arguments)
            if case.backward:
                torch.autograd.grad(output, leaves, torch.ones_like(output))
            times.append((perf_counter() - started, take_seconds()))
        call, kernels = (1e6 * median(seconds) for seconds in zip(*times, strict=True))
        yield case.op, case.name + (", forward + backward" if case.backward else ""), call, kernels


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernel-time", description=__doc__)
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--repeat", type=int, default=20, help="calls of each case")
    args = parser.parse_args(argv)
    take_seconds = in_place_of_the_library(compiled())
    print(f"{'op':20} {'case':50} {'call us':>12} {'kernels us':>12} {'beyond us':>10}")
    for op, case, call, kernels in rows(args.op, args.repeat, take_seconds):
        print(f"{op:20} {case:50} {call:12.1f} {kernels:12.1f} {call - kernels:10.1f}", flush=True)
    return 0
