"""The parts of a report on a GPU: `python -m benchmarks gpu-part NAME` prints a line of JSON for each row as it comes.

For `gpu_report.py`, which gives every part a process and a time limit of its own. A row that fails has no time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

import route_kernels as rk
from route_kernels import backends
from route_kernels.testing import Arguments, map_tensors, named_tensors, outcome, sample_arguments

from . import ops
from .chips import chip_of
from .measure import OnGpu, Row, collect, measured, running_backend
from .registry import Case, Contender, Unavailable, cases, parts
from .roofline import call_floor
from .timing import FLUSHED_BYTES, Call, EventTimer, host_seconds

DEVICE = torch.device("cuda", 0)
SECONDS_A_CASE = 1.2  # and half as much with inputs hot in the L2 cache
LAUNCH, PROFILE, STEP, TRAINING = "launch", "profile", "step", "training"
COPY = "copy, bytes a second"  # of the ceilings
PROFILES = 5
COPIED_BYTES = 4 * 2**30
MATRIX_SIZE = 8192


# ---- speed and launches ----------------------------------------------------------------------------------------------


def speed_rows(part: str, device: torch.device, timed: OnGpu | None = None) -> Iterator[Row]:
    """The cases of one part, one after the other; a case that runs out of memory is a row without times."""
    timed = timed or OnGpu(device, EventTimer(device))
    for case in cases("cuda"):
        if case.part != part:
            continue
        try:
            row, _ = measured(case, device, SECONDS_A_CASE, timed)
        except torch.OutOfMemoryError as error:
            row = {"op": case.op, "case": case.name, "part": part, "pass": case.passes, "contenders": {}}
            row["failure"] = str(error).splitlines()[0]
        yield {"kind": "speed", **row}
        collect(device)


def launch_rows(
    device: torch.device, seconds_of: Callable[[Call, torch.device], float] = host_seconds
) -> Iterator[Row]:
    """The CPU's time to queue one op, on inputs so small that the CPU never waits for the GPU."""
    for op in backends.OPS:
        arguments = next(iter(sample_arguments(op, queries=16).values()))
        arguments = map_tensors(arguments, lambda x: x.detach().to(device).requires_grad_(x.requires_grad))
        row = {"kind": LAUNCH, "op": op, "backend": running_backend(op, arguments)[0]}
        function = getattr(rk, op)
        output = function(**arguments)
        calls = {"forward": partial(function, **arguments)}
        if output.requires_grad:
            calls["forward + backward"] = partial(outcome, function, arguments, torch.ones_like(output))
        for name, call in calls.items():
            yield row | {"pass": name, "host_microseconds": round(seconds_of(call, device) * 1e6, 1)}


# ---- profiles ------------------------------------------------------------------------------------------------------


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


def profiled(prepare: Callable[[], Call], device: torch.device) -> list[Row]:
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


def passes(case: Case, contender: Contender, arguments: Arguments) -> Mapping[str, Callable[[], Call]]:
    """By direction, what prepares a run of that pass alone of a contender."""
    call = contender.call
    if not case.backward:
        return {"forward": lambda: partial(outcome, call, arguments)}
    wanted = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]

    def backward() -> Call:
        output = call(**arguments)
        return partial(torch.autograd.grad, output, wanted, torch.ones_like(output))

    return {"forward": lambda: partial(call, **arguments), "backward": backward}


def headline_cases() -> list[Case]:
    """The first headline of each op."""
    found: dict[str, Case] = {}
    for case in cases("cuda"):
        if ops.declaration(case.op).is_gpu_headline(case):
            found.setdefault(case.op, case)
    return list(found.values())


def profile_rows(case: Case, contender: Contender, device: torch.device) -> Iterator[Row]:
    """For each pass the kernels, their sum, the floor and what share of the time the floor is."""
    chip = chip_of(torch.cuda.get_device_name(device))
    arguments = case.arguments_on(device)
    for direction, prepare in passes(case, contender, contender.taken(arguments)).items():
        prepare()()  # compiles
        kernels = profiled(prepare, device)
        floor = chip and call_floor(case.op, arguments, (direction,), chip)
        yield profile_row(case, contender.name, direction, kernels, floor)


def profile_row(
    case: Case, contender: str, direction: str, kernels: Sequence[Mapping[str, Any]], floor: Mapping[str, Any] | None
) -> Row:
    total = sum(kernel["microseconds"] for kernel in kernels)
    share = floor["microseconds"] / total if floor and total else None
    row: Row = {"kind": PROFILE, "op": case.op, "case": case.name, "contender": contender, "pass": direction}
    row |= {"microseconds": round(total, 2), "kernels": list(kernels), "floor": floor}
    return row | {"floor_over_time": share}


def all_profiles(device: torch.device) -> Iterator[Row]:
    """Ours of every op, then its peers; one that cannot run or fails has no profile: its row of speed says why."""
    chosen = [(case, contender) for case in headline_cases() for contender in case.contenders]
    for case, contender in sorted(chosen, key=lambda pair: pair[1] is not pair[0].contenders[0]):
        collect(device)
        try:
            yield from profile_rows(case, contender, device)
        except (Unavailable, RuntimeError):
            if contender is case.contenders[0]:
                raise


# ---- whole steps -----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A detector's training step in bfloat16 on noise."""

    preset: str
    batch: int
    image: tuple[int, int]
    queries: int


PEAK_OF = Step("dino-r50", 2, (800, 1344), 900)
TRAINED, STEPS = Step("tiny", 8, (128, 128), 60), 200
PEAK_AT_MOST = 1.1  # times what is planned


def _stepper(step: Step, device: torch.device) -> Any:
    from .stepper import Stepper  # whose packages a machine with a GPU may not have

    height, width = step.image
    sizes = dict(batch=step.batch, height=height, width=width, queries=step.queries)
    return Stepper(route=True, fused=True, preset=step.preset, device=device, dtype=torch.bfloat16, **sizes)


def step_rows(device: torch.device, step: Step = PEAK_OF, steps: int = 3) -> Iterator[Row]:
    """Peak memory of a whole step at `lean`, beside the plan."""
    from route_detr.config import preset
    from route_detr.memory.planner import Request, plan

    config = preset(step.preset).updated({"detector.num_queries": step.queries, "detector.memory": "lean"})
    planned = plan(Request(config, step.batch, step.image, torch.bfloat16)).peak
    row: Row = {"kind": STEP, "preset": step.preset, "batch": step.batch, "image": list(step.image)}
    yield row | {"planned_bytes": planned, "peak_bytes": None, "at_most": PEAK_AT_MOST, "met": None}
    stepper = _stepper(step, device)
    found = [stepper.step() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    met = None if peak is None else peak <= PEAK_AT_MOST * planned
    row |= {"planned_bytes": planned, "peak_bytes": peak, "at_most": PEAK_AT_MOST, "met": met}
    yield row | {"seconds": min(each["seconds"] for each in found), "loss": found[-1]["loss"]}


def training_rows(device: torch.device, step: Step = TRAINED, steps: int = STEPS) -> Iterator[Row]:
    """The same training twice, with deterministic algorithms: every loss must be the same number."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product
    torch.use_deterministic_algorithms(True, warn_only=True)  # some of PyTorch's own backward passes know no such form
    losses = []
    for time in range(2):
        stepper = _stepper(step, device)
        found = [stepper.step() for _ in range(steps)]
        losses.append([each["loss"] for each in found])
        row: Row = {"kind": TRAINING, "preset": step.preset, "time": time + 1, "steps": steps}
        row |= {"seconds_a_step": statistics.median(each["seconds"] for each in found)}
        row |= {"first_loss": losses[time][0], "last_loss": losses[time][-1]}
        yield row | {"same_losses": losses[0] == losses[time] if time else None}


PARTS: Mapping[str, Callable[[torch.device], Iterator[Row]]] = {
    **{part: partial(speed_rows, part) for part in parts()},
    STEP: step_rows,
    TRAINING: training_rows,
    LAUNCH: launch_rows,
    PROFILE: lambda device: (row for rows in (ceilings(device), all_profiles(device)) for row in rows),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-part", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    for row in PARTS[parser.parse_args(argv).part](DEVICE):
        print(json.dumps(row), flush=True)
    return 0
