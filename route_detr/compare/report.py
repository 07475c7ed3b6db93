"""The findings of a comparison: compare.json, compare.png and compare.md."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import route_kernels
from route_detr.compare.arms import Arm
from route_detr.compare.sitting import MEASURED, Member, Sitting
from route_detr.compare.statistics import CONFIDENCE, RESAMPLES, Interval, interval, resampled_metrics, verdict
from route_detr.data.coco import CocoDetection
from route_detr.evaluation import METRICS, matched
from route_detr.files import SOFTWARE, write_text
from route_detr.run import Run

AXES = {"step": "equal steps", "train_seconds": "equal time"}
FILES = {"JSON": "compare.json", "picture": "compare.png", "report": "compare.md"}
EVALUATIONS = 10  # of a run whose steps are known, unless train.eval_steps says something else
METHOD = (
    f"{CONFIDENCE:.0%} intervals of differences paired by seed: mean ∓ t √(seeds + images). *Seeds* is the variance of "
    "the differences over the seeds, divided by their number; *images* the variance of the mean difference over "
    f"{RESAMPLES} bootstrap draws of the validation images, alike for all runs, of the runs' ends; t has "
    "Satterthwaite's degrees of freedom. Each interval answers for itself: of twenty, one misses by chance."
)


def curve(run: Run) -> dict[str, np.ndarray]:
    """Steps, seconds of training and the metrics at each evaluation of a run, from 0 on; NaN where there is no AP."""
    scored = [record for record in run.records() if "AP" in record]
    columns = {name: [0.0, *(each[name] for each in scored)] for name in AXES}
    columns |= {name: [0.0, *(np.nan if each[name] is None else each[name] for each in scored)] for name in METRICS}
    return {name: np.array(column, dtype=float) for name, column in columns.items()}


def at(curves: dict[str, np.ndarray], axis: str, limit: float) -> np.ndarray:
    """[6] the metrics at so many steps or seconds, straight between two evaluations."""
    return np.array([np.interp(limit, curves[axis], curves[name]) for name in METRICS])


def analysed(sitting: Sitting, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that the three files say, ready for JSON."""
    members = [[Member(sitting, arm, seed) for seed in seeds] for arm in arms]
    curves = [[curve(Run(member.folder)) for member in row] for row in members]
    measured = [[json.loads((m.folder / MEASURED).read_text(encoding="utf-8")) for m in row] for row in members]
    data = CocoDetection(sitting.data["val_json"], sitting.data["val_images"], sitting.base.transforms)
    truth = [each for number in data.image_ids for each in data.coco.imgToAnns.get(number, ())]
    drawn = np.array(
        [
            [
                resampled_metrics(matched(data.coco, [dict(t) for t in truth], found["detections"], data.image_ids))
                for found in row
            ]
            for row in measured
        ]
    )  # [arms, seeds, RESAMPLES, 6]
    ends = {axis: np.array([[each[axis][-1] for each in row] for row in curves]) for axis in AXES}  # [arms, seeds]
    costs = ends["train_seconds"] / ends["step"]
    found: dict[str, Any] = {**_surroundings(sitting), "arms": {arm.name: arm.changes for arm in arms}}
    found |= {"seeds": list(seeds), "validation_images": len(data), "method": METHOD, "results": {}, "differences": {}}
    last = [[at(each, "step", np.inf) for each in row] for row in curves]
    for number, arm in enumerate(arms):
        found["results"][arm.name] = {
            **_named(np.mean(last[number], 0)),
            "steps": float(ends["step"][number].mean()),
            "seconds_a_step": float(costs[number].mean()),
            "cost": float((costs[number] / costs[0]).mean()),
            "costs": [float(each) for each in costs[number] / costs[0]],
            "competition": _means([each["competition"] for each in measured[number]]),
        }
    for number, arm in enumerate(arms[1:], start=1):
        found["differences"][arm.name] = {
            name: _compared([curves[0], curves[number]], [drawn[0], drawn[number]], axis, len(data), len(seeds))
            for axis, name in AXES.items()
        }
    found["runs"] = [
        {"arm": member.arm.name, "seed": member.seed}
        | {axis: float(each[axis][-1]) for axis in AXES}
        | {"curve": [{k: _number(v[i]) for k, v in each.items()} for i in range(1, len(each["step"]))]}
        | {"competition": result["competition"]}
        for row in zip(members, curves, measured, strict=True)
        for member, each, result in zip(*row, strict=True)
    ]
    return found


def _compared(
    curves: Sequence[Sequence[dict[str, np.ndarray]]], drawn: Sequence[np.ndarray], axis: str, images: int, seeds: int
) -> dict[str, Any]:
    """Two arms where the shorter run of each seed ends: an interval for each metric, and the sentence of the AP's."""
    points = np.array(
        [
            at(ours, axis, limit) - at(first, axis, limit)
            for first, ours in zip(*curves, strict=True)
            for limit in [min(first[axis][-1], ours[axis][-1])]
        ]
    )  # [seeds, 6]
    intervals = [interval(points[:, n], drawn[1][..., n] - drawn[0][..., n], images) for n in range(len(METRICS))]
    return {
        **{name: _as_dict(each) for name, each in zip(METRICS, intervals, strict=True)},
        "AP_by_seed": [_number(each) for each in points[:, 0]],
        "verdict": verdict(intervals[0], seeds),
    }


def _as_dict(found: Interval) -> dict[str, float | None]:
    return {name: None if value is None else _number(value) for name, value in found._asdict().items()}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _named(values: np.ndarray) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(METRICS, values, strict=True)}


def _means(tables: Sequence[Any]) -> Any:
    """Nested dictionaries of numbers, averaged; None where one of them knows none."""
    if isinstance(tables[0], dict):
        return {name: _means([each[name] for each in tables]) for name in tables[0]}
    return None if None in tables else float(np.mean(tables))


def _surroundings(sitting: Sitting) -> dict[str, Any]:
    """Where and with what it was run."""
    root = Path(route_kernels.__file__).parents[1]
    asked = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
    )
    device = torch.cuda.get_device_name() if sitting.device.startswith("cuda") else platform.processor()
    return {
        "software": SOFTWARE,
        "versions": {"route_kernels": route_kernels.__version__, "torch": torch.__version__},
        "commit": asked.stdout.strip() or None,
        "device": device or platform.machine(),
        "jobs": sitting.jobs,
        "threads": sitting.threads,
        "begins": sitting.begins,
        "changes": sitting.changes,
        "data": sitting.data["train_json"],
    }


def as_markdown(found: dict[str, Any]) -> str:
    """compare.md: the sentences first, then the numbers they rest on."""
    first, *others = found["arms"]
    lines = [f"# {' and '.join(found['arms'])}", ""]
    for name in others:
        both = found["differences"][name]
        lines += [f"- **{name}** against {first}, {place}: {both[place]['verdict']}." for place in AXES.values()]
    lines += ["", "## Average precision and cost", ""]
    lines += [f"Means over {len(found['seeds'])} seeds; {found['validation_images']} validation images.", ""]
    lines += _table(
        ["arm", *METRICS, "steps", "seconds a step", f"cost against {first}"],
        [
            [
                *(name, *(_text(result[metric]) for metric in METRICS), f"{result['steps']:.0f}"),
                *(f"{result['seconds_a_step']:.3f}", _spread(result["cost"], result["costs"])),
            ]
            for name, result in found["results"].items()
        ],
    )
    lines += [
        "",
        f"Side by side {found['jobs']} runs, {found['threads']} threads each; seconds are those of steps alone.",
    ]
    lines += ["", f"## Differences to {first}", ""]
    lines += _table(
        ["arm", "at", *METRICS],
        [
            [name, place, *(_interval_text(values[metric]) for metric in METRICS)]
            for name, places in found["differences"].items()
            for place, values in places.items()
        ],
    )
    lines += ["", found["method"], ""]
    lines += ["At equal steps or time both runs of a seed are read where the shorter one ends: on a straight line "]
    lines[-1] += "between two evaluations, before its own drop of the learning rate perhaps."
    lines += ["", "## Competition", ""]
    rows = {
        "claims an object": ("claims", "mean"),
        "objects claimed more than once": ("claims", "several"),
        "AP lost to duplicates": ("AP_lost_to_duplicates",),
        "entropy of winners, bits": ("winner_entropy",),
    }
    lines += _table(
        ["arm", *rows],
        [
            [name, *(_text(_inside(result["competition"], keys)) for keys in rows.values())]
            for name, result in found["results"].items()
        ],
    )
    routing = [
        [f"{name}, layer {layer}", *(_text(table[key], "+.3f") for key in table if key != "pairs")]
        for name, result in found["results"].items()
        for layer, table in result["competition"]["routing"].items()
    ]
    if routing:
        tables = (table for each in found["results"].values() for table in each["competition"]["routing"].values())
        head = [key.replace("_", " ") for key in next(tables) if key != "pairs"]
        lines += ["", "Correlations over all pairs of queries:", "", *_table(["router", *head], routing)]
    return "\n".join([*lines, ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _inside(values: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        values = values[key]
    return values


def _text(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _spread(mean: float, values: Sequence[float]) -> str:
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def _interval_text(found: dict[str, float | None]) -> str:
    if found["low"] is None or found["high"] is None:
        return _text(found["difference"], "+.3f")
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def write(found: dict[str, Any], folder: Path) -> None:
    """Write numbers and text into the comparison's folder."""
    write_text(folder / FILES["JSON"], json.dumps(found, indent=1) + "\n")
    write_text(folder / FILES["report"], f"<!-- {SOFTWARE} -->\n{as_markdown(found)}")
