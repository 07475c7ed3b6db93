"""Verify every contender, then time them in turns: `python -m benchmarks ops` (`make bench`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import memory, report
from .device import RESULTS, circumstances
from .registry import OURS, Case, Target, cases
from .timing import ratio, spread, time_in_turns
from .verification import verify

SECONDS_A_CASE, SECONDS_QUICK = 10.0, 0.5


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """One row of the results. A row in which any contender gives a wrong result has no times."""
    row = {"op": case.op, "case": case.name, "pass": "forward + backward" if case.backward else "forward"}
    row |= {"failure": None, "contenders": {}, "targets": []}
    arguments = case.make_arguments()
    grad_output = None
    if case.backward:
        shape = case.contenders[0].call(**arguments).shape
        grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    verified = verify(case, arguments, grad_output)
    if verified.failures:
        name, wrong = next(iter(verified.failures.items()))
        return row | {"failure": f"{name}: {wrong}"}
    row["contenders"] |= {name: {"unavailable": reason} for name, reason in verified.unavailable.items()}
    row["contenders"] |= summary(time_in_turns(verified.calls, seconds))
    row["targets"] = verdicts(case.targets, row["contenders"])
    return row


def summary(samples: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For each contender the spread of its samples in milliseconds, and of our time over its, round by round."""
    contenders: dict[str, dict[str, Any]] = {}
    for name, times in samples.items():
        milliseconds = {key: round(value * 1e3, 4) for key, value in spread(times).items()}
        contenders[name] = {"milliseconds": milliseconds, "rounds": len(times)}
        if name != OURS:
            ours_over_theirs = {key: round(value, 4) for key, value in ratio(samples[OURS], times).items()}
            contenders[name]["our_time_over_its"] = ours_over_theirs
    return contenders


def verdicts(targets: Sequence[Target], contenders: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether each target is met; None where its contender has no time."""
    found = []
    for target in targets:
        result = contenders[target.against].get("our_time_over_its")
        met = None if result is None else result["median"] <= target.at_most
        found.append({"against": target.against, "at_most": round(target.at_most, 4), "met": met})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each row as it comes, then the tables; returns 1 when a row failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small cases, few rounds; nothing is written")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--op", help="only the rows of this op")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/DEVICE)")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    chosen = [case for case in cases() if (case.quick or not args.quick) and args.op in (None, case.op)]
    if not chosen:
        parser.error(f"--op: expected one of {', '.join(sorted({case.op for case in cases()}))}, got {args.op}")

    results = {**circumstances(), "speed": [], "memory": []}
    for case in chosen:
        row = measured(case, SECONDS_QUICK if args.quick else SECONDS_A_CASE)
        print(report.line(row), file=sys.stderr, flush=True)
        results["speed"].append(row)
    if args.op in (None, "routed_attention"):
        for memory_case in memory.cases(args.quick):
            row = memory.measured_apart(memory_case)
            print(report.memory_line(row), file=sys.stderr, flush=True)
            results["memory"].append(row)
    print(report.text(results))
    if args.out is not None or not (args.quick or args.op):
        folder = args.out or RESULTS / results["device"]["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ops.json").write_text(json.dumps(results, indent=1) + "\n")
        report.draw(results, folder)
        print(f"written: {folder}/ops.json, {', '.join(report.PICTURES)}")
    return int(any(row["failure"] for row in results["speed"] + results["memory"]))
