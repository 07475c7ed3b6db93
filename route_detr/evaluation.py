"""COCO average precision of detections, by pycocotools, without its printing."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from route_detr.errors import NoGroundTruth

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def coco_results(
    detections: Sequence[dict[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections as COCO result entries.

    Args:
        detections: an image each: scores [K], labels [K] int64 from 0, boxes [K, 4] as (x0, y0, x1, y1) pixels.
        image_ids: the COCO id of each image.
        category_ids: the COCO category id of each label.
    """
    results = []
    for found, image_id in zip(detections, image_ids, strict=True):
        boxes = found["boxes"].detach().cpu().double()
        corner, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
        rows = zip(found["scores"].tolist(), found["labels"].tolist(), corner.tolist(), extent.tolist(), strict=True)
        for score, label, (x, y), (w, h) in rows:
            bbox = [round(value, 3) for value in (x, y, w, h)]
            category = int(category_ids[label])
            results.append({"image_id": int(image_id), "category_id": category, "bbox": bbox, "score": score})
    return results


def _result_set(ground_truth: COCO, results: Sequence[dict[str, Any]]) -> COCO:
    """What ``COCO.loadRes`` builds, for an empty list too."""
    detected = COCO()
    annotations = []
    for number, result in enumerate(results, start=1):
        area = result["bbox"][2] * result["bbox"][3]
        annotations.append({**result, "id": number, "area": area, "iscrowd": 0})
    detected.dataset = {
        "images": ground_truth.dataset["images"],
        "categories": copy.deepcopy(ground_truth.dataset["categories"]),
        "annotations": annotations,
    }
    detected.createIndex()
    return detected


def check_ground_truth(ground_truth: COCO, image_ids: Sequence[int]) -> None:
    """Raise `NoGroundTruth` when the images hold no object that counts (crowd regions do not)."""
    annotations = ground_truth.loadAnns(ground_truth.getAnnIds(imgIds=list(image_ids), iscrowd=False))
    if not annotations:
        raise NoGroundTruth(
            f"average precision is undefined: none of the {len(image_ids)} evaluated images has an annotated box"
        )


def average_precision(
    ground_truth: COCO, results: Sequence[dict[str, Any]], image_ids: Sequence[int]
) -> dict[str, float | None]:
    """AP, AP50, AP75, APs, APm and APl of box detections (COCO protocol, at most 100 an image).

    No detections give 0. A size class without any object gives None.

    Raises:
        NoGroundTruth: no object is annotated in these images.
    """
    check_ground_truth(ground_truth, image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, _result_set(ground_truth, results), "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = (float(value) for value in evaluation.stats[: len(METRICS)])
    return {name: value if value >= 0 else None for name, value in zip(METRICS, stats, strict=True)}


def table(metrics: dict[str, float | None]) -> str:
    """The metrics as two aligned lines of text; '-' where the set has no object of that size."""
    values = ["-" if metrics[name] is None else f"{metrics[name]:.3f}" for name in METRICS]
    return "\n".join("  ".join(f"{cell:>5}" for cell in row) for row in (METRICS, values))
