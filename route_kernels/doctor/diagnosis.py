"""The doctor's visit: build, apply, compare, time, tell."""

from __future__ import annotations

import statistics
import sys

import torch
from torch import nn

from .. import backends
from .agreement import AGREE, DIFFER, UNANSWERED, Agreement, borrowed, compare, seed_everything
from .fitting import Apply, applied, what_fits
from .target import Inputs, UsageError, build, described, example_inputs, load, moved, users_code
from .training_step import MEASURED, peak_bytes, seconds, step

VERDICTS = {AGREE: "agrees", DIFFER: "DIFFERS", UNANSWERED: "none, as the model's own code does not repeat itself"}
NAMED = 4
"""So many of the largest errors are listed."""


def diagnose(target: str, *, dtype: str | None = None, repeat: int = 5, seed: int = 0) -> int:
    """Examine the model that `target` builds; prints as it goes, and returns the exit code.

    Args:
        target: "your.module:function" or "file.py:function", see `target.load` and `target.build`.
        dtype: of weights and inputs where time and memory are measured, by its name in torch; None is the model's.
            Agreement is always judged in float64 (float32 where the model cannot).
        repeat: timed steps each way, alternating.
        seed: of weights, inputs, dropout and perturbation.

    Raises:
        UsageError: the target does not give a model that runs.
    """
    if repeat < 1:
        raise UsageError(f"--repeat: expected a positive number, got {repeat}")
    seed_everything(seed)
    model, given = build(load(target), target)
    parameters = list(model.parameters())
    if not parameters:
        raise UsageError(f"{target}: expected a model with parameters, got {type(model).__name__}, which has none")
    if dtype is not None:
        model.to(getattr(torch, dtype))
    inputs = _inputs_that_run(model, given)
    where = parameters[0].device
    say(f"model      {type(model).__name__}, {sum(p.numel() for p in parameters) / 1e6:.3g} M parameters, ", end="")
    say(f"{str(parameters[0].dtype).removeprefix('torch.')} on {where}, {'train' if model.training else 'eval'} mode")
    say(f"inputs     {described(inputs)}")
    say("")

    appliers, reasons = what_fits(model)
    if not appliers:
        say("nothing applied: no integration of route-kernels fits this model")
        for reason in reasons:
            say(f"  {reason}")
        return UNANSWERED
    progress("comparing outputs and gradients")
    agreement = compare(model, inputs, appliers, seed)
    if not agreement.calls and agreement.failure is None:
        tell_that_nothing_ran(parameters, reasons)
        return UNANSWERED
    for report in agreement.reports:
        say(str(report))
    say("")
    tell_agreement(agreement)
    if agreement.failure is None:
        tell_cost(model, inputs, appliers, repeat, seed)
    return agreement.code


def say(line: str, end: str = "\n") -> None:
    print(line, end=end, flush=True)


def progress(doing: str) -> None:
    print(f"  ... {doing}", file=sys.stderr, flush=True)


def _inputs_that_run(model: nn.Module, given: Inputs | None) -> Inputs:
    """The given inputs, or the first of the made ones that the model takes, as it takes them."""
    first = next(model.parameters())
    candidates = list(example_inputs(model)) if given is None else [given]
    progress("trying a training step")
    for last, inputs in ((inputs is candidates[-1], inputs) for inputs in candidates):
        inputs = moved(inputs, first.device, first.dtype)
        try:
            with borrowed(model, first.dtype):
                step(model, inputs)
        except Exception:
            if last:
                with users_code("a training step of the model as it is"):
                    raise
            progress("not with the labels that were made up for it; without")
            continue
        return inputs
    raise AssertionError("the last candidate returns or raises")


def tell_that_nothing_ran(parameters: list[nn.Parameter], reasons: list[str]) -> None:
    without_kernel = [op for op in backends.OPS if backends.resolve(op, None, *parameters) == "reference"]
    if without_kernel:
        say("nothing of ours ran: the replacements called the original code")
    else:
        say("nothing of ours ran: the model calls nothing that could be replaced")
    for op in without_kernel:
        answers = backends.available_backends(op, parameters)
        why = [f"{name}: {reason}" for name, (_, reason) in answers.items() if name != "eager"]  # never a fallback
        say(f"  {op}: {'; '.join(why)}")
    for reason in reasons:
        say(f"  {reason}")


def tell_agreement(agreement: Agreement) -> None:
    dtype = str(agreement.dtype).removeprefix("torch.")
    say(f"agreement  of one training step in {dtype}, {agreement.perturbed} parameters of sampling layers perturbed")
    if agreement.failure is not None:
        say(f"  verdict: DIFFERS: with our ops the step raised {agreement.failure} (traceback above)")
        return
    for kind, errors in (("outputs", agreement.errors_of("output")), ("gradients", agreement.errors_of("grad"))):
        say(f"  {len(errors)} {kind}, largest relative errors:")
        for name, error in list(errors.items())[:NAMED]:
            say(f"    {error:8.1e}  {name}" + ("   (missing, or of another shape)" if error == float("inf") else ""))
    if agreement.lost:
        say(f"  {len(agreement.lost)} are not judged, as rounding alone moves them: {agreement.lost[0]}, ...")
    say(f"  the model's own code, run twice: {agreement.noise:.1e}")
    for name, reason in agreement.autocast.items():
        if reason is not None:
            say(f"  under autocast {name} is not what it was: {reason}")
    say(f"  {len(agreement.autocast)} replaced modules were compared under autocast, too")
    say(f"  verdict: {VERDICTS[agreement.code]} ({agreement.allowed:.1e} is allowed)")
    calls, calls_before = (
        ", ".join(f"{op} {count}" for op, count in sorted(counts.items()))
        for counts in (agreement.calls, agreement.calls_before)
    )
    say(f"calls      in a forward pass: {calls}")
    if calls_before:
        say(f"           in the model's own code, which is not only its own: {calls_before}")


def tell_cost(model: nn.Module, inputs: Inputs, appliers: list[Apply], repeat: int, seed: int) -> None:
    device = next(model.parameters()).device
    times: tuple[list[float], list[float]] = ([], [])
    peaks = [0, 0]

    def run() -> None:
        seed_everything(seed)
        step(model, inputs)

    with borrowed(model, next(model.parameters()).dtype):
        for round_ in range(repeat + 1):
            progress("warming up" if round_ == 0 else f"timing, {round_} of {repeat}")
            for ours, chosen in enumerate(([], appliers)):
                with applied(chosen):
                    elapsed = seconds(run, device)
                    if round_ > 0:
                        times[ours].append(elapsed)
        progress("measuring memory")
        for ours, chosen in enumerate(([], appliers)):
            with applied(chosen):
                peaks[ours] = peak_bytes(run, device)
    before, after = map(statistics.median, times)
    spread = ", ".join(f"{min(each) * 1e3:.1f} to {max(each) * 1e3:.1f}" for each in times)
    say(f"time       {before * 1e3:.1f} -> {after * 1e3:.1f} ms a step ({before / after:.2f} times as fast; ", end="")
    say(f"median of {repeat}: {spread}; threads: {torch.get_num_threads()})")
    say(f"memory     {peaks[0] / 1e6:.1f} -> {peaks[1] / 1e6:.1f} MB at the peak of a step")
    say(f"           ({MEASURED['cuda' if device.type == 'cuda' else 'cpu']})")
