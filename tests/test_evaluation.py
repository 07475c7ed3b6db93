import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from route_detr.data.report import DatasetError
from route_detr.errors import NoGroundTruth
from route_detr.evaluation import MASK_METRICS, METRICS, average_precision, coco_results, in_words, table

CATEGORY_IDS = [7, 90]


def ground_truth(annotations, images=3):
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "width": 100, "height": 100} for i in range(1, images + 1)],
        "categories": [{"id": number, "name": str(number)} for number in CATEGORY_IDS],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def box(number, image, category, x, y, w, h, crowd=0):
    return {"id": number, "image_id": image, "category_id": category, "bbox": [x, y, w, h]} | {
        "area": w * h,
        "iscrowd": crowd,
    }


TRUTH = [box(1, 1, 7, 10, 10, 20, 20), box(2, 1, 90, 50, 50, 40, 30), box(3, 2, 7, 5, 5, 20, 10)]


def found_exactly(truth, image):
    mine = [each for each in truth if each["image_id"] == image]
    corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in mine)]
    return {
        "scores": torch.linspace(0.9, 0.5, len(mine)),
        "labels": torch.tensor([CATEGORY_IDS.index(each["category_id"]) for each in mine], dtype=torch.int64),
        "boxes": torch.tensor(corners).reshape(-1, 4),
    }


def test_exact_detections_give_one_and_nothing_is_printed(capfd):
    results = coco_results([found_exactly(TRUTH, i) for i in (1, 2, 3)], [1, 2, 3], CATEGORY_IDS)
    assert {each["category_id"] for each in results} == {7, 90}
    assert results[1]["bbox"] == [50.0, 50.0, 40.0, 30.0]
    metrics = average_precision(ground_truth(TRUTH), results, [1, 2, 3])
    assert tuple(metrics) == METRICS
    assert metrics == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1, "APs": 1, "APm": 1, "APl": None})
    assert capfd.readouterr() == ("", "")


def test_no_detections_give_zero():
    metrics = average_precision(ground_truth(TRUTH), [], [1, 2, 3])
    assert (metrics["AP"], metrics["AP50"], metrics["APl"]) == (0.0, 0.0, None)


@pytest.mark.parametrize("annotations", [[], [box(1, 1, 7, 10, 10, 20, 20, crowd=1)]])
def test_nothing_to_find_is_an_error(annotations):
    with pytest.raises(NoGroundTruth, match="none of the 3 evaluated images has an annotated box"):
        average_precision(ground_truth(annotations), [], [1, 2, 3])


def test_only_the_images_asked_for_count():
    results = coco_results([found_exactly(TRUTH, 1)], [1], CATEGORY_IDS)
    assert average_precision(ground_truth(TRUTH), results, [1])["AP"] == pytest.approx(1)
    assert average_precision(ground_truth(TRUTH), results, [1, 2, 3])["AP"] < 0.9


def test_agrees_with_pycocotools_own_loading():
    rng = np.random.default_rng(0)
    truth = [
        box(n + 1, 1 + n % 3, CATEGORY_IDS[n % 2], *rng.integers(0, 50, 2).tolist(), *rng.integers(5, 50, 2).tolist())
        for n in range(12)
    ]
    detections = []
    for image in (1, 2, 3):
        exact = found_exactly(truth, image)
        noise = torch.from_numpy(rng.normal(0, 3, exact["boxes"].shape))
        detections.append({**exact, "boxes": exact["boxes"] + noise})
    results = coco_results(detections, [1, 2, 3], CATEGORY_IDS)
    coco = ground_truth(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = average_precision(coco, results, [1, 2, 3])
    assert 0 < metrics["AP"] < 1
    for name, expected in zip(METRICS, evaluation.stats, strict=False):
        assert metrics[name] == (pytest.approx(expected) if expected >= 0 else None)


def test_table_lines_up_and_marks_what_is_absent():
    head, row = table({"AP": 0.5, "AP50": 0.75, "AP75": 0.4, "APs": 0.1, "APm": 0.2, "APl": None}).splitlines()
    assert head.split() == list(METRICS)
    assert row.split() == ["0.500", "0.750", "0.400", "0.100", "0.200", "-"]
    assert len(head) == len(row)


def with_discs(truth):
    """The annotations with the disc that fills each box as run lengths; and these masks [T, 100, 100] of each image."""
    annotations, masks = [], {1: [], 2: [], 3: []}
    y, x = np.mgrid[:100, :100] + 0.5
    for each in truth:
        left, top, w, h = each["bbox"]
        disc = ((x - left - w / 2) / w) ** 2 + ((y - top - h / 2) / h) ** 2 < 0.25
        encoded = rle.encode(np.asfortranarray(disc.astype(np.uint8)))
        annotations.append({**each, "segmentation": encoded, "area": float(disc.sum())})
        masks[each["image_id"]].append(torch.from_numpy(disc))
    return annotations, {
        i: torch.stack(m) if m else torch.zeros(0, 100, 100, dtype=torch.bool) for i, m in masks.items()
    }


def test_masks_are_scored_beside_boxes(capfd):
    truth, masks = with_discs(TRUTH)
    found = [{**found_exactly(TRUTH, i), "masks": masks[i]} for i in (1, 2, 3)]
    results = coco_results(found, [1, 2, 3], CATEGORY_IDS)
    assert [set(each["segmentation"]) for each in results] == [{"size", "counts"}] * 3
    metrics = average_precision(ground_truth(truth), results, [1, 2, 3], masks=True)
    assert tuple(metrics) == METRICS + MASK_METRICS
    assert metrics["AP"] == metrics["mask_AP"] == pytest.approx(1)
    assert metrics["mask_APl"] is None
    halves = [{**each, "masks": each["masks"] & (torch.arange(100) % 2 == 0)} for each in found]
    halved = average_precision(
        ground_truth(truth), coco_results(halves, [1, 2, 3], CATEGORY_IDS), [1, 2, 3], masks=True
    )
    assert halved["AP"] == pytest.approx(1) and 0 <= halved["mask_AP"] < 0.2
    assert capfd.readouterr() == ("", "")


def test_masks_agree_with_pycocotools_own_loading():
    truth, masks = with_discs(TRUTH)
    moved = [{**found_exactly(TRUTH, i), "masks": masks[i].roll((1, 2), (1, 2))} for i in (1, 2, 3)]
    results = coco_results(moved, [1, 2, 3], CATEGORY_IDS)
    coco = ground_truth(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        only_masks = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        evaluation = COCOeval(coco, coco.loadRes(only_masks), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = average_precision(coco, results, [1, 2, 3], masks=True)
    assert 0 < metrics["mask_AP"] < 1
    assert [metrics[name] for name in MASK_METRICS[:4]] == pytest.approx(evaluation.stats[:4])


def test_no_detections_give_zero_masks_too():
    metrics = average_precision(ground_truth(with_discs(TRUTH)[0]), [], [1, 2, 3], masks=True)
    assert metrics["mask_AP"] == 0.0 and metrics["mask_APl"] is None


def test_table_has_a_row_for_masks():
    metrics = dict.fromkeys(METRICS, 0.5) | dict.fromkeys(MASK_METRICS, 0.25)
    head, boxes, masks = table(metrics).splitlines()
    assert head.split() == list(METRICS)
    assert boxes.split() == ["0.500"] * 6 + ["boxes"] and masks.split() == ["0.250"] * 6 + ["masks"]


def test_an_object_without_a_mask_to_compare_with_is_an_error():
    with pytest.raises(NoGroundTruth, match="annotation 1 has no segmentation"):
        average_precision(ground_truth(TRUTH), [], [1, 2, 3], masks=True)


def test_precision_in_words():
    boxes = {"AP": 0.1234, "AP50": 0.5, "APs": None}
    assert in_words(boxes) == "AP 0.123  AP50 0.500"
    assert in_words({**boxes, "mask_AP": 0.25, "mask_AP50": 0.75}).endswith("  mask AP 0.250  mask AP50 0.750")


HASHES = [2**64 - 1, 7, 2**53 + 1, 2**63 + 12, 2**53, 2**63 + 11, -(2**63), 0, 10**30]


@pytest.mark.parametrize("numbers", [HASHES, HASHES[::-1], [10**18 + n for n in range(9)], [-n for n in range(9)]])
@pytest.mark.parametrize("masks", [False, True])
def test_ids_are_any_integers(numbers, masks):
    """Every image holds an object of each category, found in the first two images and missed in the third."""
    images, categories, names = numbers[:3], sorted(numbers[3:5]), numbers[3:9]
    found, truth = [], []
    for image, number in enumerate(images):
        corners = [[10.0, 10.0, 30.0, 40.0], [50.0, 50.0, 90.0, 80.0]]
        seen = torch.zeros(2, 100, 100, dtype=torch.bool)
        for label, (x0, y0, x1, y1) in enumerate(corners):
            polygon = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            truth.append(box(names[2 * image + label], number, categories[label], x0, y0, x1 - x0, y1 - y0))
            truth[-1]["segmentation"] = polygon
            seen[label, int(y0) : int(y1), int(x0) : int(x1)] = True
        one = {"scores": torch.ones(2), "labels": torch.arange(2), "boxes": torch.tensor(corners), "masks": seen}
        found.append(one if image < 2 else {name: value[:0] for name, value in one.items()})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number, "width": 100, "height": 100} for number in images],
        "categories": [{"id": number, "name": "?"} for number in categories],
        "annotations": truth,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    results = coco_results(found, images, categories)
    assert [each["image_id"] for each in results] == [number for number in images[:2] for _ in categories]
    assert [each["category_id"] for each in results] == categories * 2
    ap = average_precision(coco, results, images, masks=masks)
    assert ap["AP"] == pytest.approx(67 / 101) and (not masks or ap["mask_AP"] == pytest.approx(67 / 101))
    assert average_precision(coco, results, images[:2], masks=masks)["AP"] == pytest.approx(1)


def test_what_is_found_in_a_crowd_region_is_ignored_with_or_without_its_mask():
    truth, masks = with_discs(TRUTH)
    region = box(9, 2, 7, 40, 40, 30, 30, crowd=1)
    found = [{**found_exactly(TRUTH, i), "masks": masks[i]} for i in (1, 2, 3)]
    inside = torch.zeros(1, 100, 100, dtype=torch.bool)
    inside[:, 45:60, 45:60] = True
    extra = {"scores": [1.0], "labels": [0], "boxes": [[45.0, 45.0, 60.0, 60.0]]}
    found[1] = {name: torch.cat([torch.tensor(extra[name]), found[1][name]]) for name in extra} | {
        "masks": torch.cat([inside, found[1]["masks"]])
    }
    results = coco_results(found, [1, 2, 3], CATEGORY_IDS)
    given = {"segmentation": [[40, 40, 70, 40, 70, 70, 40, 70]]}
    for crowd in ({}, {"segmentation": None}, {"segmentation": []}, {"segmentation": [[1, 2, 3, 4]]}, given):
        ap = average_precision(ground_truth([*truth, {**region, **crowd}]), results, [1, 2, 3], masks=True)
        assert ap["AP"] == ap["mask_AP"] == pytest.approx(1)
    assert average_precision(ground_truth(truth), results, [1, 2, 3], masks=True)["mask_AP"] < 0.9


def test_a_mask_that_pycocotools_would_misread_is_an_error_that_names_it():
    truth, _ = with_discs(TRUTH)
    truth[1]["segmentation"] = {"size": [100, 100], "counts": truth[1]["segmentation"]["counts"][:-3]}
    with pytest.raises(DatasetError, match="annotation 2 of image 1"):
        average_precision(ground_truth(truth), [], [1, 2, 3], masks=True)
    assert average_precision(ground_truth(truth), [], [1, 2, 3])["AP"] == 0
