"""One case: every contender verified by the tolerance policy of `route_kernels.testing`, then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import route_kernels as rk
from route_kernels import backends
from route_kernels.testing import Arguments, converted, errors, map_tensors, named_tensors, outcome

from .chips import chip_of
from .registry import OURS, Case, Contender, Target, Unavailable
from .roofline import call_floor, least_bytes
from .timing import (
    Call,
    EventTimer,
    captured,
    copies_beyond_cache,
    in_turn,
    peak_beside_inputs,
    ratio,
    spread,
    time_in_turns,
)

Results = dict[str, Tensor]
Row = dict[str, Any]
Samples = Mapping[str, list[float]]


def yardstick(
    formula: Callable[..., Tensor], arguments: Arguments, grad_output: Tensor | None
) -> tuple[Results, Results]:
    """Output and gradients of the formula in plain PyTorch: in the dtype of the arguments, and in float64."""
    exact = outcome(formula, converted(arguments, torch.float64), grad_output)
    return outcome(formula, arguments, grad_output), exact


def complaint(found: Results, rounded: Results, exact: Results) -> str | None:
    """The fault of the results of a contender, or None."""
    if found.keys() != exact.keys():
        return f"gives {', '.join(found)} instead of {', '.join(exact)}"
    for name, expected in exact.items():
        if found[name].shape != expected.shape:
            return f"{name}: shape {list(found[name].shape)} instead of {list(expected.shape)}"
    for name, (error, allowed) in errors(found, rounded, exact).items():
        if not error <= allowed:
            return f"{name}: RMS error {error:.2e}, allowed {allowed:.2e}"
    return None


def run(contender: Contender, taken: Arguments, grad_output: Tensor | None) -> Results:
    """Output and, with `grad_output`, gradients."""
    with contender.around():
        return outcome(contender.call, taken, grad_output)


@dataclass
class Verified:
    """The contenders of a case: calls of those that are right, and why the others have none."""

    calls: dict[str, partial[Results]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> dict[str, dict[str, str]]:
        found = {name: {"unavailable": why} for name, why in self.unavailable.items()}
        return found | {name: {"failure": why} for name, why in self.failures.items()}


def verify(case: Case, arguments: Arguments, grad_output: Tensor | None) -> Verified:
    """Run every contender once, forward and, with `grad_output`, backward, against the float64 results."""
    verified = Verified()
    yardsticks: dict[object, tuple[Results, Results]] = {}
    for contender in case.contenders:
        taken, kind = contender.taken(arguments), (contender.formula, contender.taken)
        try:
            found = run(contender, taken, grad_output)
        except Unavailable as reason:
            verified.unavailable[contender.name] = str(reason)
            continue
        except Exception as error:  # whatever somebody's package raises is the reason that is reported
            verified.failures[contender.name] = f"raises {error}"
            continue
        if kind not in yardsticks:
            yardsticks[kind] = yardstick(contender.formula, taken, grad_output)
        wrong = complaint(found, *yardsticks[kind])
        if wrong is not None:
            verified.failures[contender.name] = wrong
            continue
        verified.calls[contender.name] = partial(run, contender, taken, grad_output)
    return verified


def summary(samples: Samples) -> dict[str, Row]:
    """For each contender the spread of its samples in milliseconds, and of our time over its, round by round."""
    contenders: dict[str, Row] = {}
    for name, times in samples.items():
        milliseconds = {key: round(value * 1e3, 4) for key, value in spread(times).items()}
        contenders[name] = {"milliseconds": milliseconds, "rounds": len(times)}
        if name != OURS:
            ours_over_theirs = {key: round(value, 4) for key, value in ratio(samples[OURS], times).items()}
            contenders[name]["our_time_over_its"] = ours_over_theirs
    return contenders


def verdicts(targets: Sequence[Target], contenders: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Whether each target is met; None where its contender has no time."""
    found = []
    for target in targets:
        result = contenders[target.against].get("our_time_over_its")
        met = None if result is None else result["median"] <= target.at_most
        found.append({"against": target.against, "at_most": round(target.at_most, 4), "met": met})
    return found


def on_cpu(calls: Mapping[str, partial[Results]], seconds: float) -> tuple[dict[str, Row], Samples]:
    """Times by the wall clock: what each contender gets in its row, and its samples in seconds."""
    samples = time_in_turns(calls, seconds)
    return summary(samples), samples


@dataclass(frozen=True)
class OnGpu:
    """Times of replayed graphs, inputs rotating beyond the L2 cache and again hot in it, and peaks of memory."""

    device: torch.device
    sample: Callable[[Call, int], float]
    graph_of: Callable[[Call, torch.device], Call] = captured
    peak_of: Callable[[Call, torch.device], int] = peak_beside_inputs

    def __call__(self, calls: Mapping[str, partial[Results]], seconds: float) -> tuple[dict[str, Row], Samples]:
        """See `on_cpu`. A call that no graph holds is compared with ours called in the same way."""
        peaks = {name: self.peak_of(call, self.device) for name, call in calls.items()}
        rotations = {name: rotation(call) for name, call in calls.items()}
        replays: dict[str, list[Call]] = {}
        why_called: dict[str, str] = {}
        for name, rotated in rotations.items():
            try:
                replays[name] = [self.graph_of(call, self.device) for call in rotated]
            except RuntimeError as error:
                why_called[name] = str(error).splitlines()[0]
        if OURS in why_called:
            why_called |= dict.fromkeys(replays, "as ours")
            replays.clear()
        samples: dict[str, list[float]] = {}
        times: dict[str, Row] = {}
        if replays:
            samples |= time_in_turns({name: in_turn(each) for name, each in replays.items()}, seconds, self.sample)
            times |= summary(samples)
            hot = summary(time_in_turns({name: each[0] for name, each in replays.items()}, seconds / 2, self.sample))
            for name, found in hot.items():
                times[name]["hot_milliseconds"] = found["milliseconds"]
        if why_called:
            both = {name: in_turn(rotations[name]) for name in (OURS, *why_called)}
            called = time_in_turns(both, seconds, self.sample)
            times |= {name: found for name, found in summary(called).items() if name in why_called}
            samples |= {name: called[name] for name in why_called}
        for name, found in times.items():
            found |= {"replayed": name not in why_called, "peak_bytes": peaks[name]}
            if name in why_called:
                found["why_not_replayed"] = why_called[name]
        return times, samples


def measured(
    case: Case,
    device: torch.device,
    seconds: float | None,
    timed: Callable[[Mapping[str, partial[Results]], float], tuple[dict[str, Row], Samples]] | None = None,
) -> tuple[Row, Samples]:
    """One row of the results, and samples in seconds. With `seconds` None contenders are verified alone.

    Where ours is wrong nothing is timed; another contender that is wrong has no time.
    """
    row: Row = {"op": case.op, "case": case.name, "pass": case.passes, "failure": None, "contenders": {}, "targets": []}
    if case.part:
        row["part"] = case.part
    arguments = case.arguments_on(device)
    row["backend"], reason = running_backend(case.op, arguments)
    if row["backend"] == "reference":
        return row | {"failure": f"no kernel runs here: {reason}"}, {}
    verified = verify(case, arguments, _grad_output(case, arguments) if case.backward else None)
    row["contenders"] |= verified.reasons()
    if OURS not in verified.calls:
        return row | {"failure": f"{OURS}: {verified.failures.get(OURS) or verified.unavailable[OURS]}"}, {}
    collect(device)
    if seconds is None:
        return row | {"contenders": row["contenders"] | {name: {} for name in verified.calls}}, {}
    if timed is None:
        timed = on_cpu if device.type == "cpu" else OnGpu(device, EventTimer(device))
    times, samples = timed(verified.calls, seconds)
    row["contenders"] |= times
    row["targets"] = verdicts(case.targets, row["contenders"])
    ours = times[OURS]
    if case.microseconds_at_most is not None:
        met = ours["milliseconds"]["median"] * 1e3 <= case.microseconds_at_most
        row["time_target"] = {"at_most_microseconds": case.microseconds_at_most, "met": met}
    if "peak_bytes" in ours:
        least = least_bytes(case.op, arguments, directions_of(case))
        for found in times.values():
            found["bytes_a_second"] = least / (found["milliseconds"]["median"] / 1e3)
        row["floor"] = floor_of(case, arguments, device)
        if case.peak_at_most is not None:
            met = ours["peak_bytes"] <= case.peak_at_most
            row["peak_target"] = {"at_most_bytes": case.peak_at_most, "met": met}
    return row, samples


def running_backend(op: str, arguments: Arguments) -> tuple[str, str]:
    """The backend that this call takes, and why no other would."""
    tensors = [tensor for _, tensor in named_tensors(arguments)]
    name = backends.resolve(op, rk.requested_backend(), *tensors)
    reasons = {other: rk.can_run(op, other, *tensors)[1] for other in backends.BACKENDS if other != name}
    return name, "; ".join(f"{other}: {reason}" for other, reason in reasons.items())


def floor_of(case: Case, arguments: Arguments, device: torch.device) -> Mapping[str, Any] | None:
    """The roofline's floor on this GPU, or None where its rates are not listed."""
    chip = chip_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if chip is None else call_floor(case.op, arguments, directions_of(case), chip)


def directions_of(case: Case) -> tuple[str, ...]:
    return ("forward", "backward") if case.backward else ("forward",)


def rotation(call: partial[Results]) -> list[Call]:
    """The call with as many copies of its arguments as the L2 cache does not hold."""
    contender, arguments, grad_output = call.args
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(arguments))
    copies = [map_tensors(arguments, _copied) for _ in range(copies_beyond_cache(size) - 1)]
    return [partial(call.func, contender, each, grad_output) for each in (arguments, *copies)]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _grad_output(case: Case, arguments: Arguments) -> Tensor:
    with torch.no_grad():
        output = case.contenders[0].call(**arguments)
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def collect(device: torch.device) -> None:
    """Give back what verification held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
