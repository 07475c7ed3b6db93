"""Results as tables and pictures: `python -m benchmarks tables RESULTS.json [--readme README.md]`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .codebases import BEFORE
from .registry import OURS

PICTURES = ("speed.png", "memory.png")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
DROP_INS_BEGIN, DROP_INS_END = "<!-- drop-ins: begin -->", "<!-- drop-ins: end -->"
Row = Mapping[str, Any]


def read(file: Path) -> dict[str, Any]:
    """Results with rows, out of what `pytest benchmarks --benchmark-json` wrote, or what has rows already."""
    results = json.loads(file.read_text())
    if "benchmarks" not in results:
        return results
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for each in (*(benchmark["extra_info"] | benchmark for benchmark in results["benchmarks"]), *results["not_timed"]):
        where = {name: each[name] for name in ("op", "case", "pass")}
        row = rows.setdefault(tuple(where.values()), {**where, "failure": None, "contenders": {}, "targets": []})
        if "stats" not in each:
            reasons = {name: each[name] for name in ("unavailable", "failure") if name in each}
            row["contenders"][each["contender"]] = reasons
            row["failure"] = row["failure"] or (each.get("failure") if each["contender"] == OURS else None)
            continue
        spread = {name: round(each["stats"][name] * 1e3, 4) for name in ("median", "min", "max")}
        found = {"milliseconds": spread, "rounds": each["stats"]["rounds"]}
        found |= {name: each[name] for name in ("our_time_over_its",) if name in each}
        row["contenders"][each["contender"]] = found
        row["targets"] += each["targets"]
    for row in rows.values():
        row["contenders"] = dict(sorted(row["contenders"].items(), key=lambda item: item[0] != OURS))
    machine = results["machine_info"] | {name: results[name] for name in ("commit", "dirty", "date")}
    return {**machine, "speed": list(rows.values()), "memory": results["memory"]}


def is_of_drop_ins(results: Row) -> bool:
    """Whether these are the results of `drop-ins`, not those of `ops`."""
    return "codebases" in results


def _milliseconds(contender: Row) -> str:
    if "unavailable" in contender:
        return "not available"
    if "failure" in contender:
        return "failed, not timed"
    median, least, most = (_three_digits(contender["milliseconds"][part]) for part in ("median", "min", "max"))
    return f"{median} ms ({least} to {most})"


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "MISSED", None: "not measured"}[met]


def _target(row: Row, against: str) -> str:
    return "; ".join(
        f"at most {target['at_most']:.3g}: {_verdict(target['met'])}"
        for target in row["targets"]
        if target["against"] == against
    )


def line(row: Row) -> str:
    """One row of speed in one line."""
    where = f"{row['op']}, {row['case']}, {row['pass']}: "
    if row["failure"]:
        return where + f"FAILED, not timed: {row['failure']}"
    return where + "; ".join(f"{name} {_milliseconds(each)}" for name, each in row["contenders"].items())


def speed_cells(rows: Iterable[Row]) -> list[list[str]]:
    """op, case, pass, our time, the contender, its time, ours over its, target: a line for each other contender."""
    table = []
    for row in rows:
        start = [row["op"], row["case"], row["pass"]]
        if row["failure"]:
            table.append([*start, "failed, not timed", row["failure"], "", "", ""])
            continue
        ours = _milliseconds(row["contenders"][OURS])
        for name, other in row["contenders"].items():
            if name == OURS:
                continue
            over = other.get("our_time_over_its")
            quotient = "" if over is None else f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})"
            table.append([*start, ours, name, _milliseconds(other), quotient, _target(row, name)])
    return table


SPEED_HEAD = ["op", "case", "pass", "ours", "compared with", "its time", "ours / its", "target"]
MEMORY_HEAD = ["op", "case", "pass", "contender", "peak of the process", "before the call", "target"]


def memory_cells(rows: Iterable[Row]) -> list[list[str]]:
    table = []
    for row in rows:
        start = [row["op"], row["case"], row["pass"], row["contender"]]
        if row["failure"]:
            table.append([*start, f"failed: {row['failure']}", "", ""])
            continue
        target = row["target_bytes"]
        goal = "" if target is None else f"below {target / 1e6:.0f} MB: {_verdict(row['target_met'])}"
        table.append([*start, f"{row['peak_bytes'] / 1e6:.0f} MB", f"{row['before_bytes'] / 1e6:.0f} MB", goal])
    return table


DROP_INS_HEAD = ["codebase", "model", "a step sees", "with", "before", "after", "after / before"]
DROP_INS_HEAD += ["memory before", "memory after"]


def _step_megabytes(contender: Row) -> str:
    return f"{(contender['peak_bytes'] - contender['before_bytes']) / 1e6:.0f} MB"


def drop_in_cells(rows: Iterable[Row]) -> list[list[str]]:
    """Cells under `DROP_INS_HEAD`: a line for each way to apply; one for a codebase that is missing or failed."""
    table = []
    for row in rows:
        start = [row["codebase"], row["model"], row["inputs"]]
        reason = row["failure"] or row["unavailable"]
        if reason:
            state = "failed, not timed" if row["failure"] else "not installed"
            table.append([*start, "", state, reason.splitlines()[0], "", "", ""])
            continue
        before = row["contenders"][BEFORE]
        for name, after in row["contenders"].items():
            if name == BEFORE:
                continue
            over = after["its_time_over_before"]
            quotient = f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})"
            times = [_milliseconds(before), _milliseconds(after), quotient]
            table.append([*start, f"`{name}`", *times, _step_megabytes(before), _step_megabytes(after)])
    return table


def aligned(head: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal."""
    widths = [max(len(cells[column]) for cells in [head, *table]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in [head, *table]
    ]
    return "\n".join(each.rstrip() for each in lines)


def markdown(head: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *table]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def origin(results: Row) -> str:
    """Where the figures come from, in a sentence."""
    device, versions = results["device"], results["versions"]
    changed = {True: " with changes", False: "", None: ""}[results["dirty"]]
    commit = f"commit {results['commit'][:12]}{changed}" if results["commit"] else "no commit"
    return (
        f"{device['cpu']}, {device['threads']} threads, SIMD level {device['simd_level']}, "
        f"PyTorch {versions['torch']}, {commit}, {results['date'][:10]}; medians, in brackets the range"
    )


def text(results: Row) -> str:
    """The tables for a terminal."""
    if is_of_drop_ins(results):
        return "\n".join([origin(results), "", aligned(DROP_INS_HEAD, drop_in_cells(results["codebases"]))])
    parts = [origin(results), "", aligned(SPEED_HEAD, speed_cells(results["speed"]))]
    if results["memory"]:
        parts += ["", aligned(MEMORY_HEAD, memory_cells(results["memory"]))]
    return "\n".join(parts)


def readme_section(results: Row, link: str) -> str:
    """The README's text between the marks, the marks included, and a link to the JSON.

    It shows the ops' rows that have a target or failed, and the drop-ins that are installed.
    """
    if is_of_drop_ins(results):
        return _drop_ins_section(results, link)
    held_to = [cells for cells in speed_cells(results["speed"]) if cells[-1] or cells[3].startswith("failed")]
    speed = markdown(SPEED_HEAD, held_to)
    memory = markdown(MEMORY_HEAD, memory_cells(results["memory"]))
    left = f"The rows that have a target; all {len(results['speed'])} cases, eager PyTorch too, are in the JSON."
    return f"{BEGIN}\n[{origin(results)}]({link}). {left}\n\n{speed}\n\n{memory}\n{END}"


def _drop_ins_section(results: Row, link: str) -> str:
    table = markdown(DROP_INS_HEAD, drop_in_cells(row for row in results["codebases"] if row["unavailable"] is None))
    meaning = (
        "A training step is forward, loss and backward; memory is what it adds to its process at the peak. "
        "Both sides agree in float64, in loss and in every parameter's gradient."
    )
    return f"{DROP_INS_BEGIN}\n[{origin(results)}]({link}). {meaning}\n\n{table}\n{DROP_INS_END}"


def fill(page: str, section: str) -> str:
    """The page with a section replaced: what stands between the marks with which the new one begins and ends.

    Raises:
        ValueError: the marks are missing.
    """
    begin, *_, end = section.splitlines()
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"README: expected the marks {begin} and {end}")
    return before + section + after


def draw(results: Row, folder: Path) -> None:
    """`PICTURES` in `folder`: milliseconds of every contender, and peak memory."""
    from matplotlib.figure import Figure

    rows = [row for row in results["speed"] if not row["failure"]]
    figure = Figure(figsize=(10, 1.5 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    for place, name in enumerate(names):
        found = [(index, row["contenders"].get(name, {}).get("milliseconds")) for index, row in enumerate(rows)]
        shown = [(index, times["median"]) for index, times in found if times]
        offsets = [index + (place - (len(names) - 1) / 2) * 0.8 / len(names) for index, _ in shown]
        axes.barh(offsets, [median for _, median in shown], height=0.8 / len(names), label=name)
    axes.set_yticks(range(len(rows)), [f"{row['op']}\n{row['case']}, {row['pass']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_title(origin(results), fontsize=7)
    axes.legend(fontsize=7)
    figure.savefig(folder / PICTURES[0], dpi=130)

    held = [row for row in results["memory"] if not row["failure"]]
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(held)), layout="constrained")
    axes = figure.subplots()
    axes.barh([f"{row['contender']}, {row['case']}" for row in held], [row["peak_bytes"] / 1e6 for row in held])
    axes.invert_yaxis()
    axes.set_xlabel("MB resident at the peak, PyTorch itself included")
    axes.set_title("routed_attention, forward + backward", fontsize=9)
    figure.savefig(folder / PICTURES[1], dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tables", description=__doc__)
    parser.add_argument("results", type=Path, help="an ops.json or drop_ins.json")
    parser.add_argument("--readme", type=Path, help="page whose marked section is filled in")
    args = parser.parse_args(argv)
    results = read(args.results)
    print(text(results))
    if args.readme is not None:
        link = Path(os.path.relpath(args.results.resolve(), args.readme.resolve().parent)).as_posix()
        args.readme.write_text(fill(args.readme.read_text(), readme_section(results, link)))
    return 0
