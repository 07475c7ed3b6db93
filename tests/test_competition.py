"""How queries compete: claims, winners, duplicates and routers, on cases whose answer is known."""

import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from small_training import SMALL, write_data
from test_compare_statistics import evaluation, ground_truth, made_up_results

from route_detr.compare.competition import (
    Moments,
    _entropies,
    _Layer,
    as_text,
    lost_to_duplicates,
    measure,
    overlaps,
)
from route_detr.config import preset
from route_detr.data.coco import CocoDetection
from route_detr.evaluation import average_precision, evaluate
from route_detr.model.detector import Detector
from route_detr.predict import Trained, routing_factors
from route_detr.scale_out import start_processes
from route_kernels import routing_bias

TRUTH, LABELS = np.array([[0.1, 0.1, 0.2, 0.2], [0.6, 0.6, 0.2, 0.2]]), np.array([0, 1])
THREE_STAGES = {
    "detector.backbone.settings": {**SMALL["detector.backbone.settings"], "hidden_sizes": [8, 8, 16], "depths": [1] * 3}
}
FAR = [0.4, 0.1, 0.1, 0.1]


def layer(boxes, probabilities):
    return _Layer(np.array(boxes), np.array(probabilities), TRUTH, LABELS)


def test_claims_need_overlap_and_score():
    boxes = [TRUTH[0], [0.12, 0.1, 0.2, 0.2], TRUTH[1], FAR, TRUTH[1]]
    found = layer(boxes, [[0.9, 0.0], [0.1, 0.4], [0.2, 0.29], [0.9, 0.9], [0.0, 0.3]])
    assert found.claims(0.3).tolist() == [2, 1]
    assert found.claims(0.0).tolist() == [2, 2]


def test_the_winner_is_the_surest_of_the_objects_class():
    boxes = [TRUTH[0], [0.12, 0.1, 0.2, 0.2], FAR]
    assert layer(boxes, [[0.1, 0.9], [0.2, 0.0], [1.0, 1.0]]).winners().tolist() == [1, -1]
    assert _Layer(np.array(boxes), np.ones((3, 2)), np.zeros((0, 4)), np.zeros(0, dtype=int)).claims(0.0).tolist() == []


def test_entropy_of_the_winners_over_the_layers():
    winners = [np.array([3, 1, -1, -1]), np.array([3, 2, 5, -1]), np.array([3, 4, 5, 0]), np.array([3, 7, 6, -1])]
    thirds = -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3))
    assert _entropies(winners) == pytest.approx([0.0, 2.0, thirds])  # the last object has a winner in one layer only


def test_overlaps_of_nothing():
    assert overlaps(np.zeros((0, 4)), TRUTH).shape == (0, 2) and overlaps(TRUTH, TRUTH)[0, 1] == 0


def one_image(results):
    coco = COCO()
    annotations = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}]
    coco.dataset = {"images": [{"id": 1, "width": 99, "height": 99}], "annotations": annotations}
    coco.dataset["categories"] = [{"id": 3}, {"id": 8}]
    coco.createIndex()
    boxes = [{"image_id": 1, "category_id": c, "bbox": box, "score": score} for c, box, score in results]
    return coco, boxes


def test_a_duplicate_costs_nothing_behind_the_last_hit_and_half_before_it():
    right, near = [10, 10, 50, 50], [10, 10, 50, 33]  # IoU 1 and 0.66: a hit at 4 of 10 thresholds
    coco, results = one_image([(3, right, 0.9), (3, right, 0.8)])
    assert lost_to_duplicates(evaluation(coco, results))["AP_lost_to_duplicates"] == 0
    # At 0.50 to 0.65 the first is the hit; above it is plainly wrong, and not a duplicate.
    coco, results = one_image([(3, near, 0.9), (3, right, 0.8)])
    found = lost_to_duplicates(evaluation(coco, results))
    assert found["AP"] == pytest.approx(0.4 + 0.6 * 0.5) and found["AP_lost_to_duplicates"] == 0
    coco, results = one_image([(8, right, 0.9), (3, right, 0.8)])
    assert lost_to_duplicates(evaluation(coco, results))["AP50_lost_to_duplicates"] == 0


def test_forgiven_duplicates_give_what_is_lost():
    """Against AP50 without the detections that are duplicates at IoU 0.5, and the evaluation is left as it was."""
    coco = ground_truth()
    results = made_up_results(coco, 0.05)
    marked = evaluation(coco, results)
    found = lost_to_duplicates(marked)
    assert found["AP50_lost_to_duplicates"] > 0.02
    duplicates = set()
    for entry in filter(None, marked.evalImgs):
        if entry["aRng"] == marked.params.areaRng[0]:
            objects = marked._gts[entry["image_id"], entry["category_id"]]
            real = [n for n, each in enumerate(objects) if not each["iscrowd"]]
            overlap = marked.ious[entry["image_id"], entry["category_id"]]
            free = (entry["dtMatches"][0] == 0) & (entry["dtIgnore"][0] == 0)
            rows = zip(entry["dtIds"], free, overlap, strict=True) if real else ()
            duplicates |= {number for number, unmatched, row in rows if unmatched and row[real].max() >= 0.5}
    kept = [each for number, each in enumerate(results, start=1) if number not in duplicates]
    images = [image["id"] for image in coco.dataset["images"]]
    expected = average_precision(coco, kept, images)["AP50"] - average_precision(coco, results, images)["AP50"]
    assert duplicates and found["AP50_lost_to_duplicates"] == pytest.approx(expected)
    assert lost_to_duplicates(marked) == found


def test_correlations_are_pearsons_and_unknown_of_what_never_changes():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 5))
    values[:, 1] = 0.5
    values[:, 2] += 2 * values[:, 0]
    sums = Moments()
    for part in np.array_split(values, 7):
        sums.add(part)
    table = sums.correlations()
    assert table["bias_overlap"] == pytest.approx(np.corrcoef(values[:, 0], values[:, 2])[0, 1])
    assert table["gate_overlap"] is None and table["pairs"] == 500
    competing = (values[:, 2] >= 0.5) & (values[:, 3] > 0)
    assert table["bias_mean_competing"] == pytest.approx(values[competing, 0].mean())


@pytest.mark.parametrize(
    "changes", [{"detector.routed_layers": "all"}, {"detector.masks": True, **THREE_STAGES}], ids=str
)
def test_a_detector_is_measured_over_its_validation_set(changes, tmp_path):
    root = write_data(tmp_path)
    config = preset("tiny").updated({**SMALL, **changes, "detector.num_classes": 2, "train.workers": 0})
    torch.manual_seed(0)
    detector = Detector(config.detector).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    data = CocoDetection(root / "annotations/instances_val2017.json", root / "val2017", config.transforms)
    trained = Trained(detector, config, data.category_ids, data.category_names, {}, torch.device("cpu"))
    done = []
    measures, results = measure(trained, data, 0.0, done.append)
    assert done == [2, 3] and measures["images"] == 3 and measures["objects"] == 9
    assert json.loads(json.dumps(measures)) == measures and "AP" in as_text(measures)
    claims = measures["claims"]
    assert claims["none"] + claims["one"] + claims["several"] == pytest.approx(1)
    assert {each["image_id"] for each in results} == set(data.image_ids)
    if not config.detector.masks:
        expected = evaluate(detector, data, config.train, start_processes("cpu"))
        assert measures["AP50"] == pytest.approx(expected["AP50"], abs=1e-12)
    assert list(measures["routing"]) == [str(index) for index in config.detector.routed_layer_indices]
    for index, table in measures["routing"].items():
        biases = []
        for number in range(3):
            view = routing_factors(detector, trained.input_of(data.raw_image(number)))[int(index)]
            bias = routing_bias(view.factors)[0].detach().double().numpy()
            biases.append(bias[~np.eye(len(bias), dtype=bool)])
        assert table["bias_mean"] == pytest.approx(np.mean(np.concatenate(biases)), rel=1e-4)
