"""Time and peak memory of a training step at each level of `detector.memory`, all levels in one run.

    python -m benchmarks memory-levels [--preset dino-r50 --batch 1 --image 400x667]

The levels compute the same (the first steps must agree before any is timed); each lives in a process of its own, and
they take steps in turns. Routing acts on the last two decoder layers, at the end of its schedule. The targets are for
half of the paper's 800 x 1333 in each direction.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from route_detr.config import PRESETS, preset
from route_detr.memory.command import image_size
from route_detr.memory.planner import LEVELS

from .device import RESULTS, circumstances
from .report import aligned, origin
from .timing import ratio
from .train_step import AGREEMENT
from .worker import steps_in_turns

BASE = "fused"
IMAGES = ((400, 667), (320, 448))
TARGETS = {"lean": 1.05, "tight": 1.2}  # at most, time over that of `fused`
TIMED = tuple(level for level in LEVELS if level != "none")  # eager operators: train_step.py has them


def disagreement(first: Mapping[str, Mapping[str, float]]) -> str | None:
    """The first difference between a level's first step and that of `fused`, or None."""
    for level, answer in first.items():
        for quantity in ("loss", "gradient_norm"):
            expected = first[BASE][quantity]
            if not abs(answer[quantity] - expected) <= AGREEMENT * abs(expected):
                return f"{level}: {quantity} {answer[quantity]}, {BASE} {expected}"
    return None


def measured(name: str, batch: int, image: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Milliseconds and peak memory of each level; nothing of either where the first steps differ."""
    height, width = image
    choices = {"preset": name, "batch": batch, "height": height, "width": width, "route": True, "fused": True}
    choices["queries"] = preset(name).detector.num_queries
    result = {**choices, "failure": None, "levels": {}}
    by_level = {level: {**choices, "memory": level} for level in TIMED}
    wrong, samples, found = steps_in_turns("stepper", by_level, disagreement, seconds)
    for level, each in found.items():
        over = ratio(samples[level], samples[BASE])
        target = TARGETS.get(level) if image == IMAGES[0] else None
        result["levels"][level] = {
            **each,
            "time_over_fused": {part: round(value, 4) for part, value in over.items()},
            "target": target,
            "target_met": None if target is None else over["median"] <= target,
        }
    return result | {"failure": wrong}


def table(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    setting = f"{result['preset']}, batch {result['batch']}, {result['height']} x {result['width']} pixels"
    if result["failure"]:
        return f"training step, {setting}: FAILED, not timed: {result['failure']}"
    rows = []
    for level, each in result["levels"].items():
        times, over = each["milliseconds"], each["time_over_fused"]
        met = {True: "met", False: "MISSED", None: ""}[each["target_met"]]
        rows.append(
            [
                level,
                f"{times['median']:.0f} ms",
                f"({times['min']:.0f} to {times['max']:.0f})",
                f"{over['median']:.3f} ({over['min']:.3f} to {over['max']:.3f})",
                "" if each["target"] is None else f"at most {each['target']}: {met}",
                f"{(each['peak_bytes'] - each['before_bytes']) / 1e6:.0f} MB",
            ]
        )
    head = [f"detector.memory, {setting}", "time", "", f"over {BASE}", "target", "peak memory of the step"]
    return aligned(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 when levels that should agree do not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory-levels", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="dino-r50", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    parser.add_argument(
        "--image", type=image_size, action="append", metavar="HxW",
        help="in pixels, repeatable (default: 400x667 and 320x448)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring for each size (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="folder for memory_levels.json (default: benchmarks/results/DEVICE)")
    args = parser.parse_args(argv)
    results = {**circumstances(), "settings": []}
    for image in args.image or IMAGES:
        print(
            f"measuring a step at each level of detector.memory, {image[0]} x {image[1]} pixels",
            file=sys.stderr,
            flush=True,
        )
        results["settings"].append(measured(args.preset, args.batch, image, args.seconds))
    print()
    for result in results["settings"]:
        print(table(result))
        print()
    print(origin(results))
    folder = args.out or RESULTS / results["device"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory_levels.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["failure"] for result in results["settings"]))
