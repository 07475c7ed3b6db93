"""A detector's detections in a batch, and their COCO average precision, by pycocotools without its printing."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.nn import functional

from route_detr.config import TrainConfig
from route_detr.data.annotations import compress_masks
from route_detr.data.batches import batch_loader
from route_detr.data.coco import CocoDetection
from route_detr.data.report import DatasetError, Report
from route_detr.errors import NoGroundTruth
from route_detr.model.masks import MASK_STRIDE, sampled
from route_detr.model.structures import DetectorOutput
from route_detr.scale_out import everybodys
from route_kernels.boxes import corners

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MASK_METRICS = tuple(f"mask_{name}" for name in METRICS)


@torch.no_grad()
def detections(
    output: DetectorOutput,
    sizes: Sequence[tuple[int, int]],
    top_k: int = 100,
    input_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Tensor]]:
    """The top_k (query, class) pairs of each image, best first, from the main branch's last layer.

    sizes: (height, width) in pixels of each image. Returns for each image scores [k], labels [k] int64 and boxes [k, 4]
    (x0, y0, x1, y1) in pixels, clipped to the image; k = min(top_k, N K). With masks also masks [k, height, width],
    bool; for them input_sizes gives (height, width) of the images that the detector saw, None: without padding.

    Raises FloatingPointError for an image whose logits, boxes or mask embeddings are not finite.
    """
    probabilities = output.logits.sigmoid()
    batch, queries, classes = probabilities.shape
    if len(sizes) != batch:
        raise ValueError(f"sizes: expected {batch} pairs (height, width), got {len(sizes)}")
    parts = [output.logits, output.boxes, output.pixel_embeddings, output.layers[-1].mask_embeddings]
    extremes = [extreme for part in parts if part is not None for extreme in part.flatten(1).aminmax(dim=1)]
    if spoilt := torch.stack(extremes).isfinite().all(0).logical_not().nonzero().flatten().tolist():
        raise FloatingPointError(f"what the detector computes for image {spoilt[0] + 1} of {batch} is not finite")
    scores, best = probabilities.flatten(1).topk(min(top_k, queries * classes), dim=1)
    found = []
    for image, (height, width) in enumerate(sizes):
        query = best[image] // classes
        boxes = corners(output.boxes[image]).clamp(0, 1)[query] * scores.new_tensor([width, height] * 2)
        found.append({"scores": scores[image], "labels": best[image] % classes, "boxes": boxes})
        if output.pixel_embeddings is not None:
            pixels, embeddings = output.pixel_embeddings[image], output.layers[-1].mask_embeddings[image, 0, query]
            seen = [MASK_STRIDE * side for side in pixels.shape[1:]] if input_sizes is None else input_sizes[image]
            found[-1]["masks"] = full_masks(image_mask_logits(embeddings, pixels, seen), (height, width))
    return found


def image_mask_logits(embeddings: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits [K, h/4, w/4] (rounded up) of an image of `size` (h, w) without its padding.

    embeddings [K, C]; pixels [C, H/4, W/4], padding included.
    """
    height, width = (-(-side // MASK_STRIDE) for side in size)
    extent = pixels.new_tensor([size[1], size[0]]) / (MASK_STRIDE * pixels.new_tensor(pixels.shape[:0:-1]))
    y, x = ((torch.arange(n, dtype=pixels.dtype, device=pixels.device) + 0.5) / n for n in (height, width))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1) * extent
    return (embeddings @ sampled(pixels[None], points[None])[0]).unflatten(1, (height, width))


def full_masks(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits [K, h, w] over a whole image -> bool [K, *size], by bilinear interpolation."""
    return functional.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] > 0


def coco_results(
    detections: Sequence[dict[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections as COCO result entries; masks become run lengths under ``segmentation``.

    Args:
        detections: an image each: scores [K], labels [K] int64 from 0, boxes [K, 4] as (x0, y0, x1, y1) pixels, and
            masks [K, H, W] bool of a detector that has them.
        image_ids: the COCO id of each image.
        category_ids: the COCO category id of each label.
    """
    results = []
    for found, image_id in zip(detections, image_ids, strict=True):
        boxes = found["boxes"].detach().cpu().double()
        boxes[:, 2:] -= boxes[:, :2]
        for score, label, box in zip(found["scores"].tolist(), found["labels"].tolist(), boxes.tolist(), strict=True):
            bbox = [round(value, 3) for value in box]
            category = int(category_ids[label])
            results.append({"image_id": int(image_id), "category_id": category, "bbox": bbox, "score": score})
        if "masks" in found and len(boxes):
            masks = rle.encode(np.asfortranarray(found["masks"].permute(1, 2, 0).cpu().numpy().astype(np.uint8)))
            for result, mask in zip(results[-len(boxes) :], masks, strict=True):
                result["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
    return results


def _numbered(ground_truth: COCO, entries: Sequence[dict[str, Any]], image_ids: Sequence[int]) -> COCO:
    """The entries of these images, for pycocotools: it loses ids that its arrays cannot hold, so all count from 1."""
    images = {number: count for count, number in enumerate(sorted({*image_ids}), start=1)}
    categories = {number: count for count, number in enumerate(sorted(ground_truth.cats), start=1)}
    known = [each for each in entries if each["image_id"] in images and each["category_id"] in categories]
    coco = COCO()
    coco.dataset = {
        "images": [{**ground_truth.imgs[number], "id": count} for number, count in images.items()],
        "categories": [{"id": count} for count in categories.values()],
        "annotations": [
            {**each, "id": n, "image_id": images[each["image_id"]], "category_id": categories[each["category_id"]]}
            for n, each in enumerate(known, start=1)
        ],
    }
    coco.createIndex()
    return coco


def check_ground_truth(ground_truth: COCO, image_ids: Sequence[int], masks: bool = False) -> None:
    """Raise `NoGroundTruth` when the images hold no object that counts (no crowd regions do), or one without a mask."""
    annotations = ground_truth.loadAnns(ground_truth.getAnnIds(imgIds=list(image_ids), iscrowd=False))
    if not annotations:
        raise NoGroundTruth(
            f"average precision is undefined: none of the {len(image_ids)} evaluated images has an annotated box"
        )
    without = [each["id"] for each in annotations if masks and not each.get("segmentation")]
    if without:
        raise NoGroundTruth(f"average precision of masks is undefined: annotation {without[0]} has no segmentation")


def average_precision(
    ground_truth: COCO, results: Sequence[dict[str, Any]], image_ids: Sequence[int], masks: bool = False
) -> dict[str, float | None]:
    """AP, AP50, AP75, APs, APm and APl of boxes (COCO protocol, at most 100 an image); with `masks` mask_AP, ... too.

    No detections give 0. A size class without any object gives None. Ids are any integers. A detection in a crowd
    region is ignored; a region without a segmentation is its box.

    Raises:
        NoGroundTruth: no object is annotated in these images, or one has no mask to compare with.
        DatasetError: a segmentation of the ground truth cannot be read; names its annotation.
    """
    check_ground_truth(ground_truth, image_ids, masks)
    truth = [dict(each) for number in sorted({*image_ids}) for each in ground_truth.imgToAnns.get(number, ())]
    if masks:
        sizes, faults = (
            {n: (ground_truth.imgs[n]["width"], ground_truth.imgs[n]["height"]) for n in image_ids},
            Report(),
        )
        compress_masks(truth, sizes, faults, Report())
        if faults:
            raise DatasetError(f"ground truth of masks: {faults}")
    metrics: dict[str, float | None] = {}
    for kind, names in (("bbox", METRICS), ("segm", MASK_METRICS))[: 1 + masks]:
        evaluation = matched(ground_truth, truth, results, image_ids, kind)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
            evaluation.summarize()
        values = map(float, evaluation.stats[: len(names)])
        metrics |= {name: value if value >= 0 else None for name, value in zip(names, values, strict=True)}
    return metrics


def matched(
    ground_truth: COCO,
    truth: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    kind: str = "bbox",
) -> COCOeval:
    """An evaluation of pycocotools, "bbox" or "segm", of results and true annotations with all their matching done."""
    areas = (
        each["bbox"][2] * each["bbox"][3] if kind == "bbox" else float(rle.area(each["segmentation"]))
        for each in results
    )
    found = [{**each, "area": area, "iscrowd": 0} for each, area in zip(results, areas, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*(_numbered(ground_truth, entries, image_ids) for entries in (truth, found)), kind)
        evaluation.evaluate()
    return evaluation


def in_words(metrics: Mapping[str, float | None], separator: str = "  ") -> str:
    """AP and AP50 of boxes, and of masks where there are some."""
    named = [("AP", "AP"), ("AP50", "AP50"), ("mask AP", "mask_AP"), ("mask AP50", "mask_AP50")]
    return separator.join(f"{name} {metrics[key]:.3f}" for name, key in named if key in metrics)


def table(metrics: dict[str, float | None]) -> str:
    """The metrics as aligned lines of text, of boxes and then of masks; '-' where no object has that size."""
    rows = [METRICS]
    for names in (METRICS, MASK_METRICS):
        if names[0] in metrics:
            rows.append(["-" if metrics[name] is None else f"{metrics[name]:.3f}" for name in names])
    lines = ["  ".join(f"{cell:>5}" for cell in row) for row in rows]
    return "\n".join(lines if len(rows) == 2 else [lines[0], f"{lines[1]}  boxes", f"{lines[2]}  masks"])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: CocoDetection,
    config: TrainConfig,
    accelerator: Accelerator,
    category_ids: list[int] | None = None,
    after_batch: Callable[[int], object] = lambda images: None,
) -> dict[str, float | None]:
    """Average precision of the main branch (plain self-attention) on ``dataset``, which the ranks share; alike on all.

    ``category_ids`` gives the COCO category of each label where it is not the data set's own.
    ``after_batch`` is called with the number of images that this rank has done, equally often on all.

    Raises:
        NoGroundTruth: the data set has no box to be found.
        FloatingPointError: the detector computes NaN or infinity for one of the images.
    """
    model.eval()
    indices = list(range(len(dataset)))
    batches = [indices[start : start + config.batch_size] for start in range(0, len(dataset), config.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    rounds = math.ceil(len(batches) / accelerator.num_processes)
    results, image_ids = [], []
    # A rank without a last batch computes one in vain: a sharded model needs all ranks to run it.
    for turn, batch in enumerate(batch_loader(dataset, mine + batches[: rounds - len(mine)], config.workers)):
        batch = batch.to(accelerator.device, non_blocking=True)
        output = model(batch.images, batch.padding_mask)
        if turn < len(mine):
            ids = [target.image_id for target in batch.targets]
            sizes, seen = zip(*((target.original_size, target.size) for target in batch.targets), strict=True)
            try:
                found = detections(output, sizes, config.top_k, seen)
            except FloatingPointError as error:
                raise FloatingPointError(f"no average precision of the images with the ids {ids}: {error}") from error
            results += coco_results(found, ids, category_ids or dataset.category_ids)
            image_ids += ids
        after_batch(len(image_ids))
    shares = everybodys((results, image_ids))
    results, image_ids = ([entry for share in shares for entry in share[part]] for part in (0, 1))
    return average_precision(dataset.coco, results, image_ids, masks=output.pixel_embeddings is not None)
