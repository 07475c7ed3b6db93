"""Every op against its peers: `pytest benchmarks`, or some, `pytest benchmarks -m quick -k routed_attention`.

All contenders of a case are verified, then timed in turns (`measure.py`); pytest-benchmark is told each sample by a
clock that advances by it. Our time over a contender's, round by round, is in its `extra_info`. With
`--benchmark-disable` everything is verified and nothing timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from . import memory, report
from .device import RESULTS, ROOT, device_name
from .measure import Row, Samples, measured
from .registry import Case

SECONDS_A_CONTENDER = 1.5
PEAKS: list[Row] = []
NOT_TIMED: list[Row] = []  # op, case, pass, contender and why: "unavailable" or "failure"


class Clock:
    """Stands still but for `advance`, which lets the next sample pass."""

    def __init__(self) -> None:
        self.now, self.samples = 0.0, iter(())

    def __call__(self) -> float:
        return self.now

    def set(self, samples: Sequence[float]) -> None:
        self.now, self.samples = 0.0, iter(samples)

    def advance(self) -> None:
        self.now = next(self.samples)  # it starts at 0 in each round

    def rewind(self) -> None:
        self.now = 0.0


CLOCK = Clock()


@lru_cache(maxsize=1)
def row_of(case: Case, device: torch.device, timed: bool) -> tuple[Row, Samples]:
    return measured(case, device, SECONDS_A_CONTENDER * len(case.contenders) if timed else None)


@pytest.mark.benchmark(timer=CLOCK)
def test_speed(benchmark: Any, case: Case, contender: str, device: torch.device) -> None:
    row, samples = row_of(case, device, benchmark.enabled)
    where = {name: row[name] for name in ("op", "case", "pass")}
    found = {"failure": row["failure"]} if row["failure"] else row["contenders"][contender]
    benchmark.group = f"{case.op}, {case.name}, {case.passes}"
    benchmark.skipped = contender not in samples  # else pytest-benchmark warns that its fixture was not used
    if "unavailable" in found or "failure" in found:
        NOT_TIMED.append({**where, "contender": contender, **found})
        if "failure" in found:
            pytest.fail(found["failure"])
        pytest.skip(found["unavailable"])
    if contender in samples:
        targets = [target for target in row["targets"] if target["against"] == contender]
        others = {name: value for name, value in found.items() if name not in ("milliseconds", "rounds")}
        benchmark.extra_info |= {**where, "contender": contender, "targets": targets, **others}
        CLOCK.set(samples[contender])
        benchmark.pedantic(CLOCK.advance, setup=CLOCK.rewind, rounds=len(samples[contender]))


def _memory() -> Iterator[Any]:
    for case in memory.CASES:
        marks = [pytest.mark.quick] if case.quick else []
        yield pytest.param(case, id=f"{memory.CONTENDERS[case.key].name}, N {case.queries}", marks=marks)


@pytest.mark.parametrize("memory_case", list(_memory()))
def test_memory(memory_case: memory.MemoryCase, device: torch.device) -> None:
    """Peak memory of a process: on a CPU alone."""
    if device.type != "cpu":
        pytest.skip("rows of speed have the peak on a GPU")
    row = memory.measured_apart(memory_case)
    PEAKS.append(row)
    assert row["failure"] is None


def main(argv: Sequence[str] | None = None) -> int:
    """`pytest benchmarks`, its JSON among the results of this device, the tables; `--quick`: nothing is written."""
    options = list(sys.argv[1:] if argv is None else argv)
    command = [str(Path(__file__).parent), "-q", "--rootdir", str(ROOT)]
    if "--quick" in options:
        options.remove("--quick")
        return pytest.main([*command, "-m", "quick", *options])
    written = RESULTS / device_name() / "ops.json"
    written.parent.mkdir(parents=True, exist_ok=True)
    code = pytest.main([*command, f"--benchmark-json={written}", *options])
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        results = report.read(written)
        print(report.text(results))
        report.draw(results, written.parent)
    return int(code)
