"""The speed and the memory of one part's cases on a GPU: `python -m benchmarks gpu-run attention`.

Prints a line of JSON for each row as it comes. Verified first; a contender that is wrong or fails has no time. For
`benchmarks.gpu_report`, which gives every part a process and a time limit of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import route_kernels as rk
from route_kernels import backends
from route_kernels.testing import Arguments, map_tensors, named_tensors, outcome, sample_arguments

from .chips import chip_of
from .gpu_timing import (
    Call,
    EventTimer,
    captured,
    copies_beyond_cache,
    host_seconds,
    in_turn,
    peak_beside_inputs,
)
from .registry import DEVICE, OURS, GpuCase, gpu_cases, parts
from .roofline import call_floor, least_bytes
from .run import summary, verdicts
from .timing import time_in_turns
from .verification import Results, verify

SECONDS_A_CASE = 2.0
LAUNCH = "launch"
Row = dict[str, Any]
Timer = Callable[[Call, int], float]


def measured(
    case: GpuCase,
    device: torch.device,
    timer: Timer,
    seconds: float = SECONDS_A_CASE,
    graph_of: Callable[[Call, torch.device], Call] = captured,
    peak_of: Callable[[Call, torch.device], int] = peak_beside_inputs,
) -> Row:
    """One row of the results. Where ours is wrong nothing is timed; another contender that is wrong has no time."""
    row: Row = {"kind": "speed", "op": case.op, "case": case.name, "part": case.part}
    row |= {"pass": "forward + backward" if case.backward else "forward", "failure": None, "contenders": {}}
    arguments = case.arguments_on(device)
    row["backend"], reason = running_backend(case.op, arguments)
    if row["backend"] == "reference":
        return row | {"failure": f"no kernel runs here: {reason}"}
    grad_output = _grad_output(case, arguments) if case.backward else None

    verified = verify(case, arguments, grad_output)
    row["contenders"] |= {name: {"unavailable": why} for name, why in verified.unavailable.items()}
    row["contenders"] |= {name: {"failure": why} for name, why in verified.failures.items()}
    if OURS not in verified.calls:
        return row | {"failure": f"{OURS}: {verified.failures.get(OURS) or verified.unavailable[OURS]}"}
    collect(device)

    peaks = {name: peak_of(call, device) for name, call in verified.calls.items()}
    rotations = {name: rotation(call) for name, call in verified.calls.items()}
    replays, why_called = {}, {}
    for name, calls in rotations.items():
        try:
            replays[name] = in_turn([graph_of(call, device) for call in calls])
        except RuntimeError as error:
            why_called[name] = str(error).splitlines()[0]
    if OURS in why_called:
        why_called |= dict.fromkeys(replays, "as ours")
        replays.clear()
    times = summary(time_in_turns(replays, seconds, timer)) if replays else {}
    if why_called:  # what no graph holds is compared with ours called in the same way
        calls = {name: in_turn(rotations[name]) for name in (OURS, *why_called)}
        called = summary(time_in_turns(calls, seconds, timer))
        times |= {name: found for name, found in called.items() if name in why_called}
    replays.clear()
    least = least_bytes(case.op, arguments, directions_of(case))
    for name, found in times.items():
        found |= {"replayed": name not in why_called, "peak_bytes": peaks[name]}
        found["bytes_a_second"] = least / (found["milliseconds"]["median"] / 1e3)
        if name in why_called:
            found["why_not_replayed"] = why_called[name]
    row["contenders"] |= times
    row["targets"] = verdicts(case.targets, row["contenders"])
    if case.peak_at_most is not None:
        row["peak_target"] = {"at_most_bytes": case.peak_at_most, "met": peaks[OURS] <= case.peak_at_most}
    row["floor"] = floor_of(case, arguments, device)
    return row


def running_backend(op: str, arguments: Arguments) -> tuple[str, str]:
    """The backend that this call takes, and why no other would."""
    tensors = [tensor for _, tensor in named_tensors(arguments)]
    name = backends.resolve(op, rk.requested_backend(), *tensors)
    reasons = {other: rk.can_run(op, other, *tensors)[1] for other in backends.BACKENDS if other != name}
    return name, "; ".join(f"{other}: {reason}" for other, reason in reasons.items())


def floor_of(case: GpuCase, arguments: Arguments, device: torch.device) -> Mapping[str, Any] | None:
    """The roofline's floor on this GPU, or None where its rates are not listed."""
    chip = chip_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if chip is None else call_floor(case.op, arguments, directions_of(case), chip)


def directions_of(case: GpuCase) -> tuple[str, ...]:
    return ("forward", "backward") if case.backward else ("forward",)


def rotation(call: partial[Results]) -> list[Call]:
    """The call with as many copies of its arguments as the L2 cache does not hold."""
    function, arguments, grad_output = call.args
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(arguments))
    copies = [map_tensors(arguments, _copied) for _ in range(copies_beyond_cache(size) - 1)]
    return [partial(call.func, function, each, grad_output) for each in (arguments, *copies)]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _grad_output(case: GpuCase, arguments: Arguments) -> Tensor:
    with torch.no_grad():
        output = case.contenders[0].call(**arguments)
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def collect(device: torch.device) -> None:
    """Give back what verification held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


def rows(part: str, device: torch.device) -> Iterator[Row]:
    """The rows of one part, one after the other; a case that runs out of memory is a row without times."""
    if part == LAUNCH:
        yield from launch_rows(device)
        return
    timer = EventTimer(device)
    for case in gpu_cases():
        if case.part != part:
            continue
        try:
            yield measured(case, device, timer)
        except torch.OutOfMemoryError as error:
            start = {"kind": "speed", "op": case.op, "case": case.name, "part": part, "contenders": {}}
            passes = "forward + backward" if case.backward else "forward"
            yield {**start, "pass": passes, "failure": str(error).splitlines()[0]}
        collect(device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-run", description=__doc__)
    parser.add_argument("part", choices=[*parts(), LAUNCH])
    args = parser.parse_args(argv)
    for row in rows(args.part, DEVICE):
        print(json.dumps(row), flush=True)
    return 0
