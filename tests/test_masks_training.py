"""Masks from the command line: train, evaluate and predict on digits, batch by batch with images of several sizes."""

import json

import pytest
from pycocotools import mask as rle
from small_training import options

from route_detr.cli import main
from route_detr.tools.digits import write_digits

BACKBONE = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1]}
MASKS = {"detector.masks": True, "detector.backbone.settings": BACKBONE, "train.epochs": 1, "train.mask_points": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("masks")
    write_digits(
        *(root / "digits",),
        **{"train_images": 4, "val_images": 2, "image_size": 64, "digits_per_image": (2, 4), "digit_size": (16, 30)},
        progress=False,
    )
    words = ["train", "--data", str(root / "digits"), "--out", str(root / "run"), "--device", "cpu", *options(MASKS)]
    assert main(words) == 0
    return root / "run"


def test_a_run_records_mask_losses_and_precision(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert len(steps) == 2 and all(record["layer1/dice"] > 0 < record["layer1/mask"] for record in steps)
    assert 0 <= records[-1]["mask_AP"] <= 1 and records[-1]["mask_APl"] is None


def test_eval_prints_a_row_of_masks(run, capsys):
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("boxes") and lines[2].endswith("masks")
    assert "mask_AP50" in json.loads((run / "eval-best.json").read_text())


def test_predictions_have_masks_of_the_image_file(run, tmp_path):
    images = str(run.parent / "digits" / "val2017")
    assert main(["predict", str(run), images, "--out", str(tmp_path), "--score-threshold", "0", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert found and all(rle.decode(each["segmentation"]).shape == (64, 64) for each in found)


def test_data_without_masks_are_refused_before_training(run, tmp_path, capsys):
    data = run.parent / "digits" / "annotations" / "instances_val2017.json"
    content = json.loads(data.read_text())
    del content["annotations"][0]["segmentation"]
    broken = tmp_path / "val.json"
    broken.write_text(json.dumps(content))
    words = ["--data", str(run.parent / "digits"), "--val-json", str(broken), "--out", str(tmp_path / "run")]
    assert main(["train", *words, "--device", "cpu", *options(MASKS)]) == 2
    assert "val.json: expected a segmentation: polygons" in (told := capsys.readouterr().err)
    assert "of each object: 1 (annotation 1 of image 1: None)" in told
