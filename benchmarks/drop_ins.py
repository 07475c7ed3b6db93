"""Time and peak memory of a training step of other people's code, before and after an `apply()`.

    python -m benchmarks drop-ins [--quick] [--only transformers_rt_detr]

Before any is timed, outputs and the gradient of every parameter of both sides must agree in float64, and our ops must
have run after it alone. Then each side takes its steps (forward, loss, backward) in a process of its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from route_kernels.doctor.agreement import TOLERANCES, seed_everything
from route_kernels.doctor.fitting import applied
from route_kernels.doctor.target import moved
from route_kernels.doctor.training_step import Step
from route_kernels.testing import counted_calls, relative_errors, training_step

from . import report
from .codebases import BEFORE, CODEBASES, Codebase
from .device import RESULTS, circumstances
from .registry import Unavailable
from .timing import ratio
from .worker import steps_in_turns

ALLOWED = TOLERANCES[torch.float64]
SAME_LOSS = 1e-3  # relative, in float32, of what has agreed in float64 before
SECONDS_A_CODEBASE, SECONDS_QUICK = 14.0, 0.0


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A model makes its tensors in this dtype where it names none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def verified(codebase: Codebase, side: int) -> dict[str, dict[str, Any]]:
    """For each of `afters` how a float64 step of it agrees with one of the original: errors, calls, what is wrong.

    Raises:
        Unavailable: a package is missing.
    """
    model, arguments = codebase.built(side)
    model, arguments = model.double(), moved(arguments, torch.device("cpu"), torch.float64)

    def step_and_calls() -> tuple[Step, dict[str, int]]:
        seed_everything(0)
        with default_dtype(torch.float64), counted_calls() as calls:
            results = training_step(model, arguments)
        return results, dict(calls)

    original, calls_before = step_and_calls()
    agreed = {}
    for after, appliers in codebase.afters.items():
        with applied(appliers(model)):
            ours, calls = step_and_calls()
        errors = relative_errors(ours, original)
        worst = max(errors, key=errors.get)
        agreed[after] = {
            "gradients": sum(name.startswith("grad ") for name in errors),
            "largest_relative_error": errors[worst],
            "allowed": ALLOWED,
            "calls": calls,
            "failure": None if errors[worst] <= ALLOWED else f"{worst}: relative error {errors[worst]:.1e}",
        }
        if calls_before or not calls:
            agreed[after]["failure"] = f"calls {calls} of our ops, before {calls_before}"
    return agreed


def disagreement(first: Mapping[str, Mapping[str, Any]], agreed: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first fault in the first steps of the processes that are to be timed, or None."""
    expected = first[BEFORE]["loss"]
    for name, answer in first.items():
        calls = agreed[name]["calls"] if name in agreed else {}
        if answer["calls"] != calls:
            return f"{name}: calls {answer['calls']} instead of {calls}"
        if not abs(answer["loss"] - expected) <= SAME_LOSS * abs(expected):
            return f"{name}: loss {answer['loss']}, before {expected}"
    return None


def measured(key: str, side: int, seconds: float) -> dict[str, Any]:
    """One codebase: milliseconds and peak memory of each side; nothing of either where they disagree."""
    codebase = CODEBASES[key]
    row = {"codebase": codebase.codebase, "model": codebase.model, "inputs": codebase.described_inputs(side)}
    row |= {"unavailable": None, "failure": None, "agreement": {}, "contenders": {}}
    try:
        row["agreement"] = verified(codebase, side)
    except Unavailable as reason:
        return row | {"unavailable": str(reason)}
    except RuntimeError as error:
        return row | {"failure": f"raises {error}"}
    for after, agreed in row["agreement"].items():
        if agreed["failure"] is not None:
            return row | {"failure": f"{after}: {agreed['failure']}"}

    sides = [(BEFORE, None), *zip(codebase.afters, codebase.afters, strict=True)]
    choices = {name: {"key": key, "after": after, "side": side} for name, after in sides}
    disagree = partial(disagreement, agreed=row["agreement"])
    row["failure"], samples, found = steps_in_turns("drop-in-step", choices, disagree, seconds)
    for name, each in found.items():
        over = ratio(samples[name], samples[BEFORE])
        row["contenders"][name] = {
            **each, "its_time_over_before": {part: round(value, 4) for part, value in over.items()},
        }  # fmt: skip
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 when two sides that should agree do not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks drop-ins", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small images, few rounds; nothing is written")
    parser.add_argument("--only", choices=CODEBASES, action="append", help="this codebase alone (may be repeated)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--out", type=Path, help="folder of drop_ins.json (default: benchmarks/results/DEVICE)")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    results = {**circumstances(), "codebases": []}
    for key in args.only or CODEBASES:
        print(f"verifying, then measuring {key}", file=sys.stderr, flush=True)
        side = CODEBASES[key].quick_side if args.quick else CODEBASES[key].side
        row = measured(key, side, SECONDS_QUICK if args.quick else SECONDS_A_CODEBASE)
        results["codebases"].append(row)
    print(report.text(results))
    if args.out is not None or not (args.quick or args.only):
        folder = args.out or RESULTS / results["device"]["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "drop_ins.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {folder}/drop_ins.json")
    return int(any(row["failure"] for row in results["codebases"]))
