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

from .device import RESULTS, ROOT, circumstances
from .gpu_parts import COPY, LAUNCH, PARTS, PROFILE, STEP, TRAINING
from .registry import MIB, OURS
from .report import aligned, markdown

NO_GPU = 2
SECONDS_TO_END = 2.0  # between the request to end and the kill
SECONDS_BETWEEN_WRITES = 1.0
MOST_WORKERS = 8
PEERS = "peers"
SHARES = {
    PEERS: 10, "build": 75, "tests": 135, "attention": 45, "flex": 40, "ms_deform_attn": 60, "ms_deform_attn_fused": 35,
    STEP: 30, TRAINING: 40, PROFILE: 35, LAUNCH: 5,
}  # fmt: skip
SHARES |= {part: 3 for part in PARTS if part not in SHARES}  # the other ops
"""Seconds of each part, by value, 525 in all; a part has what those before it have left as well."""

INSTALLED = ROOT / "build" / "peers"  # packages to compare with, out of a folder of wheels
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A command that prints rows as lines of JSON; it is stopped when its share of the time is used up."""

    name: str
    command: Sequence[str]
    seconds: float


def the_parts(wheels: Path | None = None) -> list[Part]:
    """Parts of a report, in order; with a folder of wheels these are installed, for the benchmarks alone."""
    python = sys.executable
    commands = {
        "build": [python, "setup.py", "build_ext", "--inplace"],
        "tests": [
            python, "-m", "pytest", "-m", "gpu", "-p", "benchmarks.gpu_report", "-q", "--no-header", "--tb=short",
            *_workers(), "tests/test_gpu_cuda.py", "tests/test_gpu.py",
        ],
        **{name: [python, "-m", "benchmarks", "gpu-part", name] for name in PARTS},
    }  # fmt: skip
    if wheels is not None:
        options = ["--no-deps", "--no-index", "--upgrade", "--target", str(INSTALLED)]
        commands[PEERS] = [python, "-m", "pip", "install", *options, *map(str, sorted(wheels.glob("*.whl")))]
    return [Part(name, commands[name], seconds) for name, seconds in SHARES.items() if name in commands]


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
        start_new_session=True, env=_environment(),
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


def _environment() -> dict[str, str]:
    places = [str(INSTALLED)] if INSTALLED.exists() else []
    places += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(places)}


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


LISTS = {
    "speed": "speed", STEP: "steps", TRAINING: "trainings", LAUNCH: "launch", "ceiling": "ceilings",
    PROFILE: "profiles",
}  # fmt: skip
"""Where rows of each kind lie in gpu.json."""


class Report:
    """The results so far, and their file, which is replaced as a whole: it is never half written."""

    def __init__(self, path: Path, start: Mapping[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {**start, "parts": {}, "tests": no_tests()}
        self.results |= {name: [] for name in LISTS.values()}
        self._lock = threading.Lock()
        self._written = 0.0
        self.write()

    def add(self, row: Row) -> None:
        """A row that a part has printed."""
        with self._lock:
            if row["kind"] == "test":
                count_test(self.results["tests"], row)
            else:
                self.results[LISTS[row["kind"]]].append({key: value for key, value in row.items() if key != "kind"})
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


# ---- tables ----------------------------------------------------------------------------------------------------------

MOST_FAILURES = 20
Layout = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
VERDICTS = {True: "met", False: "MISSED", None: "not measured"}

SPEED_HEAD = ["op", "case", "pass", "contender", "ms", "hot in L2", "ours / its", "target", "of a copy"]
SPEED_HEAD += ["MiB beside inputs", "target", "floor us"]
STEP_HEAD = ["preset", "batch", "image", "planned MB", "peak MB", "target", "s a step"]
TRAINING_HEAD = ["preset", "time", "steps", "s a step", "first loss", "last loss", "same losses"]
PROFILE_HEAD = ["op", "case", "pass", "contender", "us", "floor us", "bound by", "floor / time", "kernels, us"]
LAUNCH_HEAD = ["op", "pass", "backend", "host us a call"]


def no_tests() -> dict[str, Any]:
    """The outcomes of no test: what `count_test` adds to."""
    return {"passed": 0, "failed": [], "skipped": {}}


def count_test(tests: dict[str, Any], row: Row) -> None:
    """Add one outcome: a number of passed ones, how many were skipped for each reason, every failed one."""
    if row["outcome"] == "passed":
        tests["passed"] += 1
    elif row["outcome"] == "skipped":
        reason = row.get("reason", "")
        tests["skipped"][reason] = tests["skipped"].get(reason, 0) + 1
    else:
        tests["failed"].append({"test": row["test"], "reason": row.get("reason", "")})


def speed_cells(rows: Sequence[Row], copy_rate: float | None = None) -> list[list[str]]:
    """Cells under `SPEED_HEAD`: a line for each contender; ours has the floor and the targets of memory.

    "of a copy": the bytes that must be moved at least, over the time, as a share of what a copy reaches on this GPU.
    """
    table = []
    for row in rows:
        start = [row["op"], row["case"], row["pass"]]
        if row["failure"]:
            table.append([*start, "FAILED, not timed", _first_line(row["failure"]), *[""] * 7])
            continue
        targets = {target["against"]: target for target in row["targets"]}
        for name, found in row["contenders"].items():
            reason = found.get("failure") or found.get("unavailable")
            if reason:
                times = ["FAILED" if "failure" in found else "not there", _first_line(reason)]
                table.append([*start, name, *times, "", _target(targets.get(name)), *[""] * 4])
                continue
            times = found["milliseconds"]
            spread = f"{times['median']:.3g} ({times['min']:.3g} to {times['max']:.3g})"
            spread += "" if found["replayed"] else ", called"
            over, hot = found.get("our_time_over_its"), found.get("hot_milliseconds")
            target = _target(targets.get(name)) if name != OURS else _time_target(row.get("time_target"))
            table.append([
                *start, name, spread, "" if hot is None else f"{hot['median']:.3g}",
                "" if over is None else f"{over['median']:.2f}", target,
                "" if copy_rate is None else f"{found['bytes_a_second'] / copy_rate:.2f}",
                f"{found['peak_bytes'] / MIB:.0f}", *_of_ours(row, name),
            ])  # fmt: skip
    return table


def _of_ours(row: Row, name: str) -> list[str]:
    if name != OURS:
        return ["", ""]
    peak, floor = row.get("peak_target"), row.get("floor")
    goal = "" if peak is None else f"at most {peak['at_most_bytes'] / MIB:.0f}: {VERDICTS[peak['met']]}"
    return [goal, "" if floor is None else f"{floor['microseconds']:.1f} ({', '.join(floor['bound_by'])})"]


def _target(target: Row | None) -> str:
    return "" if target is None else f"at most {target['at_most']:.3g}: {VERDICTS[target['met']]}"


def _time_target(target: Row | None) -> str:
    return "" if target is None else f"at most {target['at_most_microseconds']:.3g} us: {VERDICTS[target['met']]}"


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:100]


def profile_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Cells under `PROFILE_HEAD`."""
    table = []
    for row in rows:
        floor, share = row["floor"], row["floor_over_time"]
        kernels = "; ".join(f"{each['kernel'][:48]} {each['microseconds']:.1f}" for each in row["kernels"][:4])
        of_floor = ["", ""] if floor is None else [f"{floor['microseconds']:.1f}", ", ".join(floor["bound_by"])]
        quotient = "" if share is None else f"{share:.2f}"
        start = [row["op"], row["case"], row["pass"], row["contender"], f"{row['microseconds']:.1f}"]
        table.append([*start, *of_floor, quotient, kernels])
    return table


def step_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Cells under `STEP_HEAD`; a step that was not finished has its plan alone."""
    table = []
    for row in [row for row in rows if "seconds" in row] or rows:
        planned, peak = (
            "" if row[name] is None else f"{row[name] / 1e6:.0f}" for name in ("planned_bytes", "peak_bytes")
        )
        target = f"at most {row['at_most']} of the plan: {VERDICTS[row['met']]}"
        seconds = f"{row['seconds']:.3f}" if "seconds" in row else ""
        image = " x ".join(map(str, row["image"]))
        table.append([row["preset"], str(row["batch"]), image, planned, peak, target, seconds])
    return table


def training_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Cells under `TRAINING_HEAD`."""
    same = {True: "yes: met", False: "NO: MISSED", None: ""}
    return [
        [
            row["preset"], str(row["time"]), str(row["steps"]), f"{row['seconds_a_step']:.3f}",
            f"{row['first_loss']:.4f}", f"{row['last_loss']:.4f}", same[row["same_losses"]],
        ]
        for row in rows
    ]  # fmt: skip


def launch_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Cells under `LAUNCH_HEAD`."""
    return [[row["op"], row["pass"], row["backend"], f"{row['host_microseconds']:.1f}"] for row in rows]


def origin(results: Row) -> str:
    """Where the figures come from."""
    gpu, versions = results["gpu"], results["versions"]
    changed = " with changes" if results["dirty"] else ""
    commit = f"commit {results['commit'][:12]}{changed}" if results["commit"] else "no commit"
    return (
        f"{gpu['name']}, PyTorch {versions['torch']}, Triton {gpu['triton']}, driver {gpu['driver']}, {commit}, "
        f"{results['date'][:10]}; medians of graph replays, inputs rotating beyond the L2 cache, in brackets the range"
    )


def tests_line(tests: Row) -> str:
    skipped = sum(tests["skipped"].values())
    return f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, {skipped} skipped"


def text(results: Row, layout: Layout = aligned) -> str:
    """Everything: for a terminal, or with `markdown` for a page."""
    rates = {each["what"]: each["rate"] for each in results["ceilings"]}
    sections = [
        (SPEED_HEAD, speed_cells(results["speed"], rates.get(COPY))),
        (STEP_HEAD, step_cells(results["steps"])),
        (TRAINING_HEAD, training_cells(results["trainings"])),
        (PROFILE_HEAD, profile_cells(results["profiles"])),
        (LAUNCH_HEAD, launch_cells(results["launch"])),
    ]
    tables = [layout(head, cells) for head, cells in sections if cells]
    lines = [f"{name}: {outcome['status']}, {outcome['seconds']} s" for name, outcome in results["parts"].items()]
    lines += [f"{each['what']}: {each['rate']:.3g}" for each in results["ceilings"]]
    lines.append(tests_line(results["tests"]))
    lines += [f"  skipped {count}: {reason}" for reason, count in results["tests"]["skipped"].items()]
    lines += [f"  FAILED {each['test']}" for each in results["tests"]["failed"][:MOST_FAILURES]]
    return "\n\n".join([origin(results), *tables, "\n".join(lines)])


def failed(results: Row) -> bool:
    """Whether a part did not end well, a test failed or a result of ours was wrong; a missed target is no failure."""
    return (
        any(part["status"] != "done" for part in results["parts"].values())
        or bool(results["tests"]["failed"])
        or any(row["failure"] for row in results["speed"])
    )


# ---- outcomes of tests: `pytest -p benchmarks.gpu_report` ------------------------------------------------------------

LONGEST_REASON = 2000


class Outcomes:
    """Writes through pytest's own terminal, which no test's capture swallows."""

    def __init__(self, config: Any) -> None:
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        row = {"kind": "test", "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped and isinstance(report.longrepr, tuple):
            row["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            row["reason"] = report.longreprtext[-LONGEST_REASON:]
        terminal = self.plugins.get_plugin("terminalreporter")  # made after the plugins of the command line
        terminal.write(f"\n{json.dumps(row)}\n", flush=True)  # after the letter of the outcome


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the process that has the terminal
        config.pluginmanager.register(Outcomes(config))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-report", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.log (default: benchmarks/results/GPU)")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels",
        help="folder of wheels of packages to compare with, installed beside nothing else [wheels, if it is there]",
    )  # fmt: skip
    parser.add_argument(
        "--tables", type=Path, metavar="JSON", help="run nothing: the tables of a gpu.json, in Markdown"
    )
    parser.add_argument("--part", choices=SHARES, action="append", help="only these, may be given several times")
    args = parser.parse_args(argv)
    if args.tables is not None:
        print(text(json.loads(args.tables.read_text()), markdown))
        return 0
    if not torch.cuda.is_available():
        print(f"gpu-report: no GPU: PyTorch {torch.__version__} finds none", file=sys.stderr)
        return NO_GPU
    here = gpu()
    folder = args.out or RESULTS / folder_name(here["name"])
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder / "gpu.json", {**circumstances(), "gpu": here})
    wheels = args.wheels if any(args.wheels.glob("*.whl")) else None
    chosen = [part for part in the_parts(wheels) if args.part is None or part.name in args.part]
    with (folder / "gpu.log").open("w") as log:
        run_parts(chosen, report, log)
    print(text(report.results))
    print(f"written: {folder}/gpu.json, gpu.log")
    return int(failed(report.results))
