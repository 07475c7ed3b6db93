"""Everything for whoever holds a GPU for ten minutes: `make gpu-report`, or `python -m benchmarks gpu-report`.

Builds what it can, runs the GPU tests, the headline benchmarks, and a profile of each kernel against its roofline, with
the torch, Triton and Python that are there. Every part is a process with a time limit; what a part has not used the
next ones get. Results are in gpu.json as they come, so whatever ends this early leaves what was measured.
Exit code: 0 everything ran and was right, targets met or missed; 1 something failed or was stopped; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

import torch

from . import gpu_tables
from .device import RESULTS, ROOT, circumstances
from .gpu_run import LAUNCH
from .registry import by_value
from .registry import parts as speed_parts

NO_GPU = 2
SECONDS_TO_END = 2.0  # between the request to end and the kill
SECONDS_BETWEEN_WRITES = 1.0
MOST_WORKERS = 8
SHARES = {
    "build": 85, "tests": 180,
    **{op.gpu_cases()[0].part: op.GPU_SECONDS for op in by_value()},
    LAUNCH: 8, "profile": 30, "flex": 45,
}  # fmt: skip
"""Seconds of each part, in order, 525 in all; last what compiles longest, with all that the others have left."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A command that prints rows as lines of JSON; it is stopped when its share of the time is used up."""

    name: str
    command: Sequence[str]
    seconds: float


def the_parts() -> list[Part]:
    """The parts of a report, in order."""
    python = sys.executable
    commands = {
        "build": [python, "setup.py", "build_ext", "--inplace"],
        "tests": [
            python, "-m", "pytest", "-m", "gpu", "-p", "benchmarks.outcome_lines", "-q", "--no-header", "--tb=short",
            *_workers(), "tests/test_gpu_cuda.py", "tests/test_gpu.py",
        ],
        **{name: [python, "-m", "benchmarks", "gpu-run", name] for name in (*speed_parts(), LAUNCH)},
        "profile": [python, "-m", "benchmarks", "gpu-profile"],
    }  # fmt: skip
    return [Part(name, commands[name], seconds) for name, seconds in SHARES.items()]


def _workers() -> list[str]:
    """Compiling kernels keeps a core busy each: tests side by side where pytest-xdist is there."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2)))]


def run_part(part: Part, seconds: float, on_row: Callable[[Row], None], log: TextIO) -> dict[str, Any]:
    """Run it for at most `seconds`, with everything that it starts; {"status", "seconds"}.

    Lines of JSON with a "kind" go to `on_row` as they come; everything it prints is in `log`.
    """
    log.write(f"== {part.name}: {' '.join(part.command)}\n")
    log.flush()
    started = monotonic()
    process = subprocess.Popen(
        part.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    reader = threading.Thread(target=_read, args=(process.stdout, on_row, log), daemon=True)
    reader.start()
    stopped = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        stopped = True
    finally:
        _end(process)
    reader.join(SECONDS_TO_END)
    taken = round(monotonic() - started, 1)
    if stopped:
        status = f"stopped after {seconds:.0f} s"
    else:
        status = "done" if process.returncode == 0 else f"ended with {process.returncode}"
    log.write(f"== {part.name}: {status}, {taken} s\n")
    log.flush()
    return {"status": status, "seconds": taken}


def _read(output: TextIO, on_row: Callable[[Row], None], log: TextIO) -> None:
    for line in output:
        log.write(line)
        log.flush()
        row = _row(line)
        if row is not None:
            on_row(row)


def _row(line: str) -> Row | None:
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None  # something else that begins with a brace
    return row if "kind" in row else None


def _end(process: subprocess.Popen) -> None:
    """The whole process group, politely and then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            continue


class Report:
    """The results so far, and their file, which is replaced as a whole: it is never half written."""

    def __init__(self, path: Path, start: Mapping[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {**start, "parts": {}, "tests": gpu_tables.no_tests()}
        self.results |= {"speed": [], "launch": [], "ceilings": [], "profiles": []}
        self._lock = threading.Lock()
        self._written = 0.0
        self.write()

    def add(self, row: Row) -> None:
        """A row that a part has printed."""
        with self._lock:
            if row["kind"] == "test":
                gpu_tables.count_test(self.results["tests"], row)
            else:
                lists = {"speed": "speed", LAUNCH: "launch", "ceiling": "ceilings", "profile": "profiles"}
                self.results[lists[row["kind"]]].append({key: value for key, value in row.items() if key != "kind"})
            if row["kind"] != "test" or monotonic() - self._written > SECONDS_BETWEEN_WRITES:
                self._replace()

    def end_part(self, name: str, outcome: Mapping[str, Any]) -> None:
        with self._lock:
            self.results["parts"][name] = dict(outcome)
            self._replace()

    def write(self) -> None:
        with self._lock:
            self._replace()

    def _replace(self) -> None:
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(unfinished, self.path)
        self._written = monotonic()


def run_parts(parts: Sequence[Part], report: Report, log: TextIO) -> None:
    """One after the other; a part must end when all shares up to its own are used up."""
    started, share = monotonic(), 0.0
    for part in parts:
        share += part.seconds
        outcome = run_part(part, started + share - monotonic(), report.add, log)
        report.end_part(part.name, outcome)
        print(f"{part.name}: {outcome['status']}, {outcome['seconds']} s", flush=True)


def gpu() -> dict[str, Any]:
    """The GPU that the report ran on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "runtime": torch.version.cuda or torch.version.hip,
        "driver": _driver(),
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
    }


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None  # an AMD GPU, or no tool to ask
    return done.stdout.splitlines()[0].strip()


def folder_name(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-report", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.log (default: benchmarks/results/GPU)")
    parser.add_argument("--part", choices=SHARES, action="append", help="only these, may be given several times")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"gpu-report: no GPU: PyTorch {torch.__version__} finds none", file=sys.stderr)
        return NO_GPU
    here = gpu()
    folder = args.out or RESULTS / folder_name(here["name"])
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder / "gpu.json", {**circumstances(), "gpu": here})
    chosen = [part for part in the_parts() if args.part is None or part.name in args.part]
    with (folder / "gpu.log").open("w") as log:
        run_parts(chosen, report, log)
    print(gpu_tables.text(report.results))
    print(f"written: {folder}/gpu.json, gpu.log")
    return int(gpu_tables.failed(report.results))
