"""The results of a GPU report as tables: `python -m benchmarks gpu-tables RESULTS.json [--markdown]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .registry import OURS
from .report import aligned, markdown

MIB = 2**20
MOST_FAILURES = 20
COPY = "copy, bytes a second"  # of the ceilings
Row = Mapping[str, Any]
Layout = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
VERDICTS = {True: "met", False: "MISSED", None: "not measured"}

SPEED_HEAD = [
    "op",
    "case",
    "pass",
    "contender",
    "ms",
    "ours / its",
    "target",
    "of a copy",
    "MiB beside inputs",
    "target",
    "floor us",
]
PROFILE_HEAD = ["op", "case", "pass", "us", "floor us", "bound by", "floor / time", "kernels, us"]
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
            table.append([*start, "FAILED, not timed", _first_line(row["failure"]), *[""] * 6])
            continue
        targets = {target["against"]: target for target in row["targets"]}
        for name, found in row["contenders"].items():
            reason = found.get("failure") or found.get("unavailable")
            if reason:
                times = ["FAILED" if "failure" in found else "not there", _first_line(reason)]
                table.append([*start, name, *times, _target(targets.get(name)), *[""] * 4])
                continue
            times = found["milliseconds"]
            spread = f"{times['median']:.3g} ({times['min']:.3g} to {times['max']:.3g})"
            spread += "" if found["replayed"] else ", called"
            over = found.get("our_time_over_its")
            table.append([
                *start, name, spread, "" if over is None else f"{over['median']:.2f}", _target(targets.get(name)),
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
        table.append([row["op"], row["case"], row["pass"], f"{row['microseconds']:.1f}", *of_floor, quotient, kernels])
    return table


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-tables", description=__doc__)
    parser.add_argument("results", type=Path, help="a gpu.json")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    print(text(json.loads(args.results.read_text()), markdown if args.markdown else aligned))
    return 0
