"""How sure a difference is: the resampled metrics are COCO's, the interval covers what it should."""

import numpy as np
import pytest
from pycocotools.coco import COCO

from route_detr.compare import statistics
from route_detr.compare.statistics import Interval, interval, metrics, rankings, resampled_metrics, verdict
from route_detr.evaluation import METRICS, average_precision, matched

IMAGES, CATEGORIES = 14, (3, 8)


def ground_truth(copies=(), seed=0):
    """Images with up to 6 boxes of two categories; `copies` are images that come once more at the end."""
    rng = np.random.default_rng(seed)
    entries, annotations = [], []
    of_image = {}
    for image in range(IMAGES):
        boxes = []
        for _ in range(rng.integers(7)):
            side = rng.choice([20, 60, 120])
            x, y = rng.uniform(0, 300, 2)
            boxes.append(
                [x, y, side * rng.uniform(0.7, 1.3), side, int(rng.choice(CATEGORIES)), int(rng.uniform() < 0.1)]
            )
        of_image[image] = boxes
    for number, image in enumerate([*range(IMAGES), *copies], start=1):
        entries.append({"id": number, "width": 500, "height": 500, "of": image})
        for x, y, w, h, category, crowd in of_image[image]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category})
            annotations[-1] |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": crowd}
    coco = COCO()
    coco.dataset = {"images": entries, "annotations": annotations, "categories": [{"id": n} for n in CATEGORIES]}
    coco.createIndex()
    return coco


def made_up_results(coco, error, seed=1):
    """Detections around the true boxes, `error` of a side away, with some duplicates and some out of the blue."""
    results = []
    for image in coco.dataset["images"]:
        rng = np.random.default_rng((seed, image["of"]))
        for annotation in coco.imgToAnns[image["id"]]:
            for _ in range(rng.integers(1, 4)):
                x, y, w, h = annotation["bbox"]
                shift = rng.normal(0, error, 4) * [w, h, w, h]
                category = annotation["category_id"] if rng.uniform() < 0.8 else int(rng.choice(CATEGORIES))
                found = {"image_id": image["id"], "category_id": category, "score": float(rng.uniform())}
                results.append(found | {"bbox": (np.array([x, y, w, h]) + shift).clip(1).tolist()})
    return results


def evaluation(coco, results):
    images = [image["id"] for image in coco.dataset["images"]]
    return matched(coco, coco.dataset["annotations"], results, images)


def as_array(values):
    return np.array([np.nan if values[name] is None else values[name] for name in METRICS])


@pytest.mark.parametrize("error", [0.0, 0.05, 0.2])
def test_images_that_count_once_give_cocos_metrics(error):
    coco = ground_truth()
    results = made_up_results(coco, error)
    images = [image["id"] for image in coco.dataset["images"]]
    ours = metrics(rankings(evaluation(coco, results)), np.ones((1, IMAGES), dtype=np.int64))
    np.testing.assert_allclose(ours[0], as_array(average_precision(coco, results, images)), rtol=1e-12)


def test_an_image_that_counts_twice_is_in_the_set_twice():
    weights = np.ones((3, IMAGES), dtype=np.int64)
    weights[1, [2, 5]] = [2, 3]
    coco, more = ground_truth(), ground_truth(copies=(2, 5, 5))
    ours = metrics(rankings(evaluation(coco, made_up_results(coco, 0.1))), weights)
    results, images = made_up_results(more, 0.1), [image["id"] for image in more.dataset["images"]]
    np.testing.assert_allclose(ours[1], as_array(average_precision(more, results, images)), rtol=1e-12)
    np.testing.assert_array_equal(ours[0], ours[2])


def test_a_size_without_objects_and_a_draw_without_a_category():
    coco = ground_truth()
    kept = [each for each in coco.dataset["annotations"] if each["area"] < 96**2]
    found = matched(coco, kept, made_up_results(coco, 0.1), list(range(1, IMAGES + 1)))
    weights = np.zeros((1, IMAGES), dtype=np.int64)
    only = next(each["image_id"] for each in kept if not each["iscrowd"])
    weights[0, only - 1] = 1
    ours = metrics(rankings(found), weights)
    assert np.isnan(ours[0, 5]) and 0 <= ours[0, 0] <= 1


def test_an_arm_compared_with_itself_differs_by_exactly_nothing():
    coco = ground_truth()
    runs = np.stack([resampled_metrics(evaluation(coco, made_up_results(coco, 0.1, seed)))[:, 0] for seed in (1, 2, 3)])
    assert runs.std() > 0
    found = interval(np.zeros(3), runs - runs, IMAGES)
    assert found == Interval(0.0, 0.0, 0.0)
    assert verdict(found, 3) == "makes no difference with 3 seeds: AP is the same in every run"


def test_a_better_arm_helps_and_a_worse_one_hurts():
    coco = ground_truth()
    whole = np.ones((1, IMAGES), dtype=np.int64)
    scores = {}
    for error in (0.02, 0.25):
        found = [evaluation(coco, made_up_results(coco, error, seed)) for seed in range(4)]
        points = np.array([metrics(rankings(each), whole)[0, 0] for each in found])
        scores[error] = points, np.stack([resampled_metrics(each)[:, 0] for each in found])
    (good, good_draws), (bad, bad_draws) = scores.values()
    assert verdict(interval(good - bad, good_draws - bad_draws, IMAGES), 4).startswith("helps (+0.")
    assert verdict(interval(bad - good, bad_draws - good_draws, IMAGES), 4).startswith("hurts (-0.")


def test_one_seed_has_no_interval():
    found = interval(np.array([0.1]), np.zeros((1, 9)), 5)
    assert found == Interval(0.1, None, None) and found.half_width is None
    assert verdict(found, 1).startswith("cannot tell with 1 seed:")


def test_what_cannot_be_told_says_what_would_have_been_seen():
    assert verdict(Interval(0.003, -0.009, 0.015), 5) == (
        "cannot tell with 5 seeds: differences below 0.012 would not be seen"
    )


CASES = {  # spreads of seeds, of images, of a run on an image; how often the interval may hold the truth
    "seeds": ((1.0, 0.0, 0.0), 0.965),
    "images": ((0.0, 6.0, 0.0), 0.965),
    "runs on images": ((0.0, 0.0, 6.0), 0.996),
    "all": ((0.6, 4.0, 6.0), 0.99),
}


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_interval_covers_the_truth_as_often_as_it_says(case, seeds, monkeypatch):
    (of_seeds, of_images, of_both), most = CASES[case]
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    images, truth, trials, rng = 100, 0.3, 1000, np.random.default_rng(5)
    weights = statistics.draws(images) / images  # [B, I]
    held = 0
    for _ in range(trials):
        scores = truth + of_seeds * rng.standard_normal((seeds, 1)) + of_images * rng.standard_normal(images)
        scores = scores + of_both * rng.standard_normal((seeds, images))
        found = interval(scores.mean(1), scores @ weights.T, images)
        held += found.low <= truth <= found.high
    # 0.935: two standard deviations of the count below 95 %. Too wide an interval would hold the truth always.
    assert 0.935 <= held / trials <= most
