"""One profile of each kernel against its roofline: `python -m benchmarks gpu-profile`.

Prints a line of JSON for each row: what this GPU reaches in a copy and in a matrix product, then for every op and pass
at its headline size the GPU time of each of our kernels (L2 cache cold) and the floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from route_kernels.testing import Arguments, named_tensors, outcome

from . import ops
from .chips import chip_of
from .gpu_run import collect
from .gpu_tables import COPY
from .gpu_timing import FLUSHED_BYTES, EventTimer
from .registry import DEVICE, GpuCase, gpu_cases
from .roofline import call_floor

PROFILES = 5
COPIED_BYTES = 4 * 2**30
MATRIX_SIZE = 8192
Row = dict[str, Any]


class KernelEvent(Protocol):
    """The attributes that are read of an event of torch.profiler."""

    name: str
    time_range: Any  # elapsed_us()


def copy_rate(timer: EventTimer) -> float:
    """Bytes read and written a second by a copy."""
    source = torch.empty(COPIED_BYTES, dtype=torch.int8, device=timer.device).random_()
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / timer(lambda: target.copy_(source), 10)


def matrix_rate(timer: EventTimer) -> float:
    """FLOP a second of a bfloat16 matrix product on random data."""
    shape = (MATRIX_SIZE, MATRIX_SIZE)
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device=timer.device) for _ in range(2))
    return 2 * MATRIX_SIZE**3 / timer(lambda: a @ b, 10)


def ceilings(device: torch.device) -> Iterator[Row]:
    """The rates that this GPU reaches, to hold the listed peaks against."""
    timer = EventTimer(device)
    for _ in range(2):  # the first time warms up
        rates = {COPY: copy_rate(timer), "bfloat16 matrix product, FLOP a second": matrix_rate(timer)}
    yield from ({"kind": "ceiling", "what": what, "rate": rate} for what, rate in rates.items())


def kernel_times(profiles: Sequence[Iterable[KernelEvent]]) -> list[Row]:
    """Each kernel's median over the profiles of its microseconds in one, and how often it ran; longest first."""
    found: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for events in profiles:
        sums: dict[str, float] = {}
        calls.clear()
        for event in events:
            sums[event.name] = sums.get(event.name, 0.0) + event.time_range.elapsed_us()
            calls[event.name] = calls.get(event.name, 0) + 1
        for name, time in sums.items():
            found.setdefault(name, []).append(time)
    rows = [
        {"kernel": name, "microseconds": round(statistics.median(times), 2), "calls": calls.get(name, 0)}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def profiled(prepare: Callable[[], Callable[[], object]], device: torch.device) -> list[Row]:
    """The kernels that `prepare()()` runs, profiled alone, after `prepare()` and after the L2 cache was flushed."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    profiles = []
    for _ in range(PROFILES):
        run = prepare()
        flushed.zero_()
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize(device)
        profiles.append([event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA])
    return kernel_times(profiles)


def passes(case: GpuCase, arguments: Arguments) -> Mapping[str, Callable[[], Callable[[], object]]]:
    """By direction, what prepares a run of that pass alone of our op."""
    ours = case.contenders[0].call
    if not case.backward:
        return {"forward": lambda: partial(outcome, ours, arguments)}
    wanted = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]

    def backward() -> Callable[[], object]:
        output = ours(**arguments)
        return partial(torch.autograd.grad, output, wanted, torch.ones_like(output))

    return {"forward": lambda: partial(ours, **arguments), "backward": backward}


def headline_cases() -> list[GpuCase]:
    """The first headline of each op."""
    found: dict[str, GpuCase] = {}
    for case in gpu_cases():
        if ops.declaration(case.op).is_gpu_headline(case):
            found.setdefault(case.op, case)
    return list(found.values())


def profile_rows(case: GpuCase, device: torch.device) -> Iterator[Row]:
    """For each pass the kernels, their sum, the floor and what share of the time the floor is."""
    chip = chip_of(torch.cuda.get_device_name(device))
    arguments = case.arguments_on(device)
    for direction, prepare in passes(case, arguments).items():
        prepare()()  # compiles
        kernels = profiled(prepare, device)
        yield profile_row(case, direction, kernels, chip and call_floor(case.op, arguments, (direction,), chip))


def profile_row(
    case: GpuCase, direction: str, kernels: Sequence[Mapping[str, Any]], floor: Mapping[str, Any] | None
) -> Row:
    total = sum(kernel["microseconds"] for kernel in kernels)
    share = floor["microseconds"] / total if floor and total else None
    row: Row = {"kind": "profile", "op": case.op, "case": case.name, "pass": direction, "microseconds": round(total, 2)}
    return row | {"kernels": list(kernels), "floor": floor, "floor_over_time": share}


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks gpu-profile", description=__doc__).parse_args(argv)
    for row in ceilings(DEVICE):
        print(json.dumps(row), flush=True)
    for case in headline_cases():
        collect(DEVICE)
        for row in profile_rows(case, DEVICE):
            print(json.dumps(row), flush=True)
    return 0
