"""Time and peak memory of a training step, plain and routed, in the public eager formulation and in ours.

    python -m benchmarks train-step [--run runs/demo] [--preset tiny --preset deformable-detr-pp-r50]

Routing acts on the last two decoder layers, at the end of its schedule. Each contender lives in a process of its own;
they take steps in turns. Those that should compute the same start from the same weights, and their first steps must
agree before any is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from route_detr.config import PRESETS, preset
from route_detr.evaluation import in_words
from route_detr.memory.planner import LEVELS, Request, plan
from route_detr.run import Run

from .device import RESULTS, circumstances
from .report import aligned, origin
from .timing import ratio
from .worker import steps_in_turns

AGREEMENT = 1e-3  # relative, of loss and gradient norm in float32
PLAIN, PUBLIC = "plain detector, fused ops", "routed, public form: eager ops, two passes"
OURS = "routed, ours: fused ops, packed branches"
CONTENDERS = {
    "plain detector, eager ops": {"route": False, "fused": False},
    PLAIN: {"route": False, "fused": True},
    PUBLIC: {"route": True, "fused": False},
    OURS: {"route": True, "fused": True},
}


@dataclass(frozen=True)
class Setting:
    """A preset's detector with images of one size and this many queries; `target`: our time over the plain one's."""

    preset: str
    batch: int
    height: int
    width: int
    queries: int
    target: float

    @property
    def title(self) -> str:
        size = f"{self.height} x {self.width}"
        return f"preset {self.preset}, batch {self.batch}, {size} pixels, {self.queries} queries"


def settings_of(name: str) -> list[Setting]:
    """Sizes for a preset: the tiny ones as they train and with 300 queries, the others at 600 x 800."""
    queries = preset(name).detector.num_queries
    if name.startswith("tiny"):
        return [Setting(name, 8, 128, 128, queries, 1.4), Setting(name, 2, 256, 256, 300, 1.4)]
    return [Setting(name, 1, 600, 800, queries, 1.1)]


def planned_bytes(setting: Setting) -> dict[str, int]:
    """Peak of the routed step at each level of `detector.memory`, in float32, as `route-detr memory` plans it."""
    config = preset(setting.preset).updated({"detector.num_queries": setting.queries})
    request = Request(config, setting.batch, (setting.height, setting.width), torch.float32)
    return {level: plan(request.at(level)).peak for level in LEVELS}


def disagreement(first: dict[str, dict[str, float]]) -> str | None:
    """The first difference between the first steps of a detector's fused and eager form, or None."""
    for route in (False, True):
        eager, fused = (first[name] for name, choice in CONTENDERS.items() if choice["route"] == route)
        for quantity in ("loss", "gradient_norm"):
            off = abs(fused[quantity] - eager[quantity]) / abs(eager[quantity])
            if not off <= AGREEMENT:
                detector = "routed" if route else "plain"
                return f"{detector} detector: {quantity} {fused[quantity]} fused, {eager[quantity]} eager"
    return None


def measured(setting: Setting, seconds: float) -> dict[str, Any]:
    """One setting: milliseconds and peak memory of each contender; nothing of either where the first steps differ."""
    result = {"setting": setting.title, **asdict(setting), "failure": None, "contenders": {}}
    result["planned_bytes"] = planned_bytes(setting)
    choices = {name: value for name, value in asdict(setting).items() if name != "target"}
    by_name = {name: {**choice, **choices} for name, choice in CONTENDERS.items()}
    wrong, samples, found = steps_in_turns("stepper", by_name, disagreement, seconds)
    if wrong is not None:
        return result | {"failure": wrong}
    for name, each in found.items():
        over = ratio(samples[OURS], samples[name])
        result["contenders"][name] = {
            **each, "our_time_over_its": {part: round(value, 4) for part, value in over.items()},
        }  # fmt: skip
    result["routing_costs"] = result["contenders"][PLAIN]["our_time_over_its"]["median"]
    return result | {"target_met": result["routing_costs"] <= setting.target}


def table(result: dict[str, Any]) -> str:
    """One setting for a terminal."""
    if result["failure"]:
        return f"training step, {result['setting']}: FAILED, not timed: {result['failure']}"
    head = [f"training step, {result['setting']}", "time", "", "ours / its", "peak memory", "of it by the step"]
    rows = []
    for name, each in result["contenders"].items():
        times = each["milliseconds"]
        rows.append(
            [
                name,
                f"{times['median']:.0f} ms",
                f"({times['min']:.0f} to {times['max']:.0f})",
                f"{each['our_time_over_its']['median']:.2f}",
                f"{each['peak_bytes'] / 1e6:.0f} MB",
                f"{(each['peak_bytes'] - each['before_bytes']) / 1e6:.0f} MB",
            ]
        )
    met = "met" if result["target_met"] else "MISSED"
    cost = f"routing costs {result['routing_costs']:.2f} times the plain step; target at most {result['target']}: {met}"
    levels = ", ".join(f"{level} {size / 1e6:.0f} MB" for level, size in result["planned_bytes"].items())
    return f"{aligned(head, rows)}\n{cost}\nmemory of our step by detector.memory, planned: {levels}"


def precision(run: Path) -> str:
    """AP and AP50 of the main branch by the run's last evaluation, and by its best, in words.

    Raises:
        ValueError: the run has no evaluation.
    """
    evaluated = [record for record in Run(run).records() if record.get("AP") is not None]
    if not evaluated:
        raise ValueError(f"{run}: no evaluation in metrics.jsonl")
    last, best = evaluated[-1], max(evaluated, key=lambda record: record["AP"])
    return (
        f"{run}, main branch (plain attention, as in inference), validation set: "
        f"{in_words(last, ', ')} after {last['step']} steps (best {in_words(best, ', ')})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 1 when contenders that should agree do not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks train-step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path,
        help="folder of a run: its precision comes first, presets are measured only as they train, results go there",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="folder for train_step.json (default: the run's, or benchmarks/results/DEVICE)"
    )
    parser.add_argument(
        "--preset", action="append", choices=PRESETS, help="what to measure, repeatable (default: tiny)"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="of measuring for each setting (default: 12)")
    args = parser.parse_args(argv)
    heading = None if args.run is None else precision(args.run)
    results = {**circumstances(), "settings": []}
    count = None if args.run is None else 1
    for setting in [each for name in args.preset or ["tiny"] for each in settings_of(name)[:count]]:
        print(f"measuring a training step: {setting.title}", file=sys.stderr, flush=True)
        results["settings"].append(measured(setting, args.seconds))
    print()
    if heading is not None:
        print(heading)
        print()
    for result in results["settings"]:
        print(table(result))
        print()
    print(origin(results))
    folder = args.out or args.run or RESULTS / results["device"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_step.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["failure"] for result in results["settings"]))
