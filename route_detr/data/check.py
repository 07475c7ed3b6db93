"""All that a data set holds, read once: sizes, classes, crowding, and every fault, before any training."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from route_detr.data.annotations import CocoAnnotations, inspect_annotations
from route_detr.data.coco import CocoLayout, SplitPaths
from route_detr.data.images import image_files, judged, note_verdicts
from route_detr.data.report import EXAMPLES_SHOWN, Report
from route_detr.errors import RunFailed

OVERLAPPING = 0.5  # IoU
SMALL, LARGE = 32**2, 96**2  # COCO's limits of the area of an object
CLASSES_SHOWN = 12
ROWS = 256  # boxes compared with all others of their image at once


def check_data(layout: CocoLayout, masks: bool = False, workers: int | None = None) -> dict[str, Any]:
    """Reads every annotation and every picture of both splits, in ``workers`` processes (one a CPU).

    Returns what `as_text` shows, as plain numbers, lists and texts: ``trainable``, ``masks``, and of each split its
    counts, ``corrected`` and ``faults``. Raises RunFailed where the system kills a process, DatasetError where no file
    is.
    """
    splits, files, categories = {}, {}, {}
    for name, paths in zip(layout._fields, layout, strict=True):
        content = inspect_annotations(paths.annotations, masks)
        listed = [image["file_name"] for image in content.images]
        files[name] = list(map(str, image_files(paths.images, listed, content.report)))
        categories[name] = {each["id"]: each["name"] for each in content.categories}
        _read_all(name, files[name], content, workers)
        splits[name] = _described(content, paths)
    faults = splits["val"]["faults"]
    for number in sorted({*categories["train"], *categories["val"]}):
        ours, theirs = (categories[name].get(number, "absent") for name in ("val", "train"))
        if ours != theirs:
            faults.add("categories that differ from the training set's", f"id {number} is {ours!r}, there {theirs!r}")
    real = {name: {os.path.realpath(file) for file in found if os.path.isfile(file)} for name, found in files.items()}
    for file in sorted(real["train"] & real["val"]):
        splits["val"]["corrected"].add("image files of the training set too", file)
    return {"trainable": not any(split["faults"] for split in splits.values()), "masks": masks, **splits}


def _read_all(name: str, files: Sequence[str], content: CocoAnnotations, workers: int | None) -> None:
    """Adds what is wrong with the pictures to the content's faults and its report."""
    for file, count in Counter(files).items():
        if count > 1:
            content.report.add("image files that several entries name", file)
    sizes = [(image["width"], image["height"]) for image in content.images]
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that the user started
    try:
        with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignored) as pool:
            verdicts = pool.map(partial(judged, whole=True), files, sizes, chunksize=16)
            read = list(tqdm(verdicts, name, len(files), unit="image", leave=False, disable=None))
    except BrokenProcessPool as error:
        why = "most often because memory ran out: use fewer --workers"
        raise RunFailed(f"a process that reads images was killed, {why}") from error
    note_verdicts(files, read, content.faults, content.report)


def _described(content: CocoAnnotations, paths: SplitPaths) -> dict[str, Any]:
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in content.images}
    times = Counter(category["name"] for category in content.categories)
    names = {
        each["id"]: each["name"] if times[each["name"]] == 1 else f"{each['name']} ({each['id']})"
        for each in content.categories
    }
    classes = Counter(dict.fromkeys(names.values(), 0))
    areas, crowds = [], 0
    for each in content.annotations:
        if each["iscrowd"]:
            crowds += 1
            continue
        boxes[each["image_id"]].append(each["bbox"])
        classes[names[each["category_id"]]] += 1
        areas.append(each["area"])
    if not areas and not content.faults:
        content.faults.add("expected at least one box that is no crowd region", f"none in {len(boxes)} images")
    counts = np.array([len(found) for found in boxes.values()] or [0])
    sizes = np.array([(image["width"], image["height"]) for image in content.images] or [(0, 0)])
    return {
        "annotations": str(paths.annotations),
        "images": str(paths.images),
        "num_images": len(boxes),
        "images_without_objects": int((counts == 0).sum()) if boxes else 0,
        "width": _spread(sizes[:, 0]),
        "height": _spread(sizes[:, 1]),
        "num_objects": len(areas),
        "crowd_regions": crowds,
        "small_medium_large": np.histogram(areas, [0, SMALL, LARGE, np.inf])[0].tolist(),
        "classes": dict(classes.most_common()),
        "objects_per_image": _spread(counts),
        "most_crowded": content.images[int(counts.argmax())]["file_name"] if boxes else None,
        "overlapping": sum(map(_overlapping, boxes.values())),
        "corrected": content.report,
        "faults": content.faults,
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    marks = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: float(np.percentile(values, mark, method="nearest")) for name, mark in marks.items()}


def _overlapping(boxes: Sequence[Sequence[float]]) -> int:
    """How many of the boxes (x, y, width, height) of an image overlap another by more than `OVERLAPPING`."""
    found, every = 0, np.array(boxes, dtype=np.float64).reshape(-1, 4)
    for start in range(0, len(every), ROWS):
        iou = rle.iou(every[start : start + ROWS], every, [0] * len(every))  # [up to ROWS, T]
        found += int(((iou > OVERLAPPING).sum(1) > 1).sum())  # each overlaps itself
    return found


def as_text(found: dict[str, Any]) -> str:
    """The findings of `check_data`, on a screen."""
    lines = []
    for name in CocoLayout._fields:
        lines += [f"{name}: {found[name]['annotations']}", *(f"  {line}" for line in _lines(found[name])), ""]
    can = "can be trained on" if found["masks"] else "can be trained on, without masks (--masks reads them too)"
    return "\n".join([*lines, can if found["trainable"] else "cannot be trained on: see FAULTS"])


def _lines(split: dict[str, Any]) -> list[str]:
    objects, classes = split["num_objects"], split["classes"]
    width, height, crowding = split["width"], split["height"], split["objects_per_image"]
    small, medium, large = (f"{100 * count / max(objects, 1):.0f} %" for count in split["small_medium_large"])
    named = [f"{' '.join(name.split())} {count}" for name, count in classes.items() if count]  # each on one line
    absent = [" ".join(name.split()) for name, count in classes.items() if not count]
    return [
        f"images    {split['num_images']}, {split['images_without_objects']} without an object; "
        f"width {width['min']:.0f} to {width['max']:.0f} (median {width['median']:.0f}), "
        f"height {height['min']:.0f} to {height['max']:.0f} (median {height['median']:.0f})",
        f"objects   {objects}, and {split['crowd_regions']} crowd regions; "
        f"small {small}, medium {medium}, large {large} (limits 32 x 32 and 96 x 96 pixels)",
        f"classes   {len(classes)}: {_first(named, CLASSES_SHOWN)}",
        *([f"          without an object: {_first(absent, CLASSES_SHOWN)}"] if absent else []),
        f"crowding  objects an image: median {crowding['median']:.0f}, 95 % {crowding['p95']:.0f}, at most "
        f"{crowding['max']:.0f} ({split['most_crowded']}); "
        f"{100 * split['overlapping'] / max(objects, 1):.1f} % of the boxes overlap another by IoU > {OVERLAPPING}",
        *_kinds("noted", split["corrected"]),
        *(_kinds("FAULTS", split["faults"]) or ["faults    none"]),
    ]


def _kinds(title: str, report: Report) -> list[str]:
    """A line for each kind, the most frequent first, and one for each of its first examples."""
    lines = []
    for kind, examples in sorted(report.items(), key=lambda item: -len(item[1])):
        lines += [f"{title:<8}  {len(examples)} x {kind}"]
        lines += [f"            {example}" for example in examples[:EXAMPLES_SHOWN]]
    return lines


def _first(words: Sequence[str], count: int) -> str:
    return ", ".join(words[:count]) + (f" and {len(words) - count} more" if len(words) > count else "")
