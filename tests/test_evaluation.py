import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from route_detr.errors import NoGroundTruth
from route_detr.evaluation import METRICS, average_precision, coco_results, table

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
