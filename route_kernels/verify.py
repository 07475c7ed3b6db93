"""`route-kernels verify`: every op, dtype and backend that runs here, held to the promises of this package.

Each runs on outputs and scratch memory filled with NaN, at sizes that leave ragged tiles, and its output and gradients

    accuracy    are at most twice as far from float64 as those of PyTorch's own operators in the same dtype
    repeats     have the same bits a second time
    threads     have the same bits with 1, 3 and all threads
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import route_kernels as rk

from . import native
from .backends import OPS, PRODUCTS, can_run
from .precision import FLOATING
from .testing import (
    Arguments,
    assert_as_accurate,
    declaration,
    errors,
    map_tensors,
    outcome,
    sample_arguments,
    yardstick,
)
from .triton.availability import interpreted

PROMISES = ("accuracy", "repeats", "threads")

Results = dict[str, torch.Tensor]


def sizes(op: str, backend: str) -> list[dict[str, Any]]:
    """For `sample_arguments`: small and odd; for kernels also of several workers, and of a detector with 37 queries."""
    declared = declaration(op)
    if backend == "triton" and interpreted():  # which takes minutes for more
        return [declared.TINY]
    detector = {name: size for name, size in getattr(declared, "DETECTOR", {}).items() if name != "points"}
    return [{}] if backend == "reference" else [{}, getattr(declared, "OF_WORKERS", {}), {**detector, "queries": 37}]


@contextmanager
def deterministic_mode(on: bool) -> Iterator[None]:
    """PyTorch's deterministic mode, in which every allocation is filled with NaN first."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def difference(found: Results, expected: Results) -> str:
    """The first result that has other bits than expected, or ""."""
    return next((name for name in expected if not torch.equal(found[name], expected[name])), "")


def faults(op: str, backend: str, arguments: Arguments, device: torch.device) -> Iterator[tuple[str, str, float]]:
    """(promise, how it is broken or "", error as a share of the allowed one) of one call."""
    grad_output, eager, exact = yardstick(op, arguments)

    def run(deterministic: bool = True) -> Results:
        block = nullcontext() if op in PRODUCTS else rk.backend(backend)
        with block, deterministic_mode(deterministic):
            return outcome(getattr(rk, op), arguments, grad_output)

    first = run()
    for found in [first] if device.type == "cpu" else [first, run(deterministic=False)]:
        shares = [error / allowed for error, allowed in errors(found, eager, exact).values() if error]
        try:
            assert_as_accurate(found, eager, exact)
        except AssertionError as error:
            yield "accuracy", str(error), max(shares, default=0.0)
        else:
            yield "accuracy", "", max(shares, default=0.0)
    yield "repeats", difference(run(), first), 0.0
    for count in (1, 3) if backend == "cpu" else ():
        with with_threads(count):
            name = difference(run(), first)
        yield "threads", name and f"{name} with {count} instead of {torch.get_num_threads()}", 0.0


def examined(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A row: the worst error as a share of the allowed one, and by promise how samples break it; None: not examined."""
    broken: dict[str, list[str] | None] = dict.fromkeys(PROMISES)
    worst = 0.0
    for size in sizes(op, backend):
        for label, sample in sample_arguments(op, dtype, **size).items():
            given = map_tensors(sample, lambda x: x.detach().to(device).requires_grad_(x.requires_grad))
            try:
                found = list(faults(op, backend, given, device))
            except Exception as error:  # is what this sample shows; the others are still to run
                found = [("accuracy", f"{type(error).__name__}: {error}".splitlines()[0], 0.0)]
            for promise, fault, share in found:
                broken[promise] = (broken[promise] or []) + ([f"{label} {size}: {fault}"] if fault else [])
                worst = max(worst, share)
    name = str(dtype).removeprefix("torch.")
    return {
        "op": op,
        "backend": backend,
        "dtype": name,
        "device": device.type,
        "error": round(worst, 3),
        "broken": broken,
    }


def rows(devices: Sequence[torch.device]) -> Iterator[dict[str, Any]]:
    """A row for each op, backend and dtype that these devices can run."""
    for device in devices:
        for op in (*OPS, *PRODUCTS):
            for backend in ("pytorch",) if op in PRODUCTS else ("reference", "cpu", "triton", "cuda"):
                for dtype in FLOATING:
                    if op in PRODUCTS or can_run(op, backend, torch.empty(0, dtype=dtype, device=device))[0]:
                        yield examined(op, backend, dtype, device)


def circumstances(devices: Sequence[torch.device]) -> dict[str, Any]:
    """Versions and devices of a report."""
    return {
        "versions": {"route-kernels": rk.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "system": f"{platform.system()} {platform.machine()}",
        "native_kernels": native.load_error or f"SIMD level {native.simd_level()}",
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row's line of the table."""
    answers = []
    for promise in PROMISES:
        broken = row["broken"][promise]
        answers.append("-" if broken is None else "FAILED" if broken else "ok")
    return [row["op"], row["backend"], row["dtype"], row["device"], f"{row['error']:.2f}", *answers]


def printed(words: Sequence[str]) -> None:
    print("  ".join(word.ljust(width) for word, width in zip(words, (20, 9, 8, 6, 5, 8, 7, 7), strict=True)).rstrip())


def verify(gpu: bool = False, path: Path | None = None) -> int:
    """Print the table and write the JSON to `path`; 0 where every promise holds, else 1."""
    if gpu and not torch.cuda.is_available():
        print(f"route-kernels verify: --gpu: expected a GPU, PyTorch {torch.__version__} finds none")
        return 1
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if gpu else [])]
    report = circumstances(devices)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"{versions}; {report['system']}, {report['threads']} threads; native kernels: {report['native_kernels']}\n")
    printed(["op", "backend", "dtype", "device", "error", *PROMISES])
    report["rows"], failed = [], 0
    for row in rows(devices):
        report["rows"].append(row)
        printed(cells(row))
        for promise in PROMISES:
            for fault in row["broken"][promise] or []:
                print(f"    {promise}: {fault}")
        failed += any(row["broken"][promise] for promise in PROMISES)
    print("\nerror: the worst, as a share of the allowed one: twice that of PyTorch's own operators, and rounding")
    print(f"{len(report['rows']) - failed} of {len(report['rows'])} hold")
    if path is not None:
        path.write_text(json.dumps({**report, "passed": failed == 0}, indent=1) + "\n")
    return int(failed > 0)
