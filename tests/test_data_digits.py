"""Crowded digits: what the images and annotations hold, repeatability, and what a killed generator leaves."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from coco_samples import single_scale
from PIL import Image
from pycocotools import mask as rle

from route_detr.cli import main
from route_detr.data.coco import CocoDetection, coco_layout, open_splits
from route_detr.data.report import DatasetError
from route_detr.data.transforms import TransformConfig
from route_detr.tools import digits as generator
from route_detr.tools.digits import DigitsParameters, digit_scans, generate_scene, is_digits_folder, write_digits

SMALL = {"train_images": 6, "val_images": 3, "progress": False}


def parameters(**changes):
    defaults = {"seed": 0, "train_images": 6, "val_images": 3, "image_size": 128}
    return DigitsParameters(
        **{**defaults, "digits_per_image": (5, 25), "digit_size": (16, 44), **changes},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "set"
    write_digits(out, **SMALL)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def instances(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


def test_the_folder_is_an_ordinary_coco_folder_without_a_warning(folder, recwarn, capsys):
    train, val = open_splits(coco_layout(folder), single_scale(128))
    assert (len(train), len(val)) == (6, 3)
    assert train.category_names == [str(digit) for digit in range(10)]
    assert not train.report and not val.report
    assert not [warning for warning in recwarn if "instances" in str(warning.message)]
    assert len(val.coco.getAnnIds()) == val.num_boxes
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("split", ["train", "val"])
def test_counts_sizes_and_boxes_are_within_what_was_asked_for(folder, split):
    found = instances(folder, split)
    for image in found["images"]:
        with Image.open(folder / f"{split}2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (128, 128)
            assert picture.mode == "RGB"
        boxes = np.array([a["bbox"] for a in found["annotations"] if a["image_id"] == image["id"]])
        assert 5 <= len(boxes) <= 25
        assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 128).all()
        assert boxes[:, 3].min() >= 12 and boxes[:, 2:].max() <= 46


def test_masks_are_the_visible_ink_disjoint_inside_their_boxes_and_areas_count_them(folder):
    found = instances(folder, "train")
    for image in found["images"]:
        annotations = [a for a in found["annotations"] if a["image_id"] == image["id"]]
        masks = np.stack([rle.decode(a["segmentation"]) for a in annotations])
        assert masks.sum(0).max() == 1
        for annotation, mask in zip(annotations, masks, strict=True):
            x, y, w, h = annotation["bbox"]
            assert mask.sum() == mask[y : y + h, x : x + w].sum() == annotation["area"] > 0
            assert annotation["iscrowd"] == 0


def test_boxes_are_tight_around_the_whole_ink_of_a_digit_that_nothing_hides(folder):
    scene = generate_scene(parameters(), "train", 0)
    whole = np.flatnonzero(scene.masks.sum((1, 2)) == scene.ink)
    assert len(whole)
    for index in whole:
        rows, columns = np.nonzero(scene.masks[index])
        tight = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
        assert tuple(scene.boxes[index]) == tight


def test_overlap_is_heavy_and_yet_a_quarter_of_every_digit_is_in_sight():
    scans = digit_scans(0)
    visible = np.concatenate(
        [
            scene.masks.sum((1, 2)) / scene.ink
            for scene in (generate_scene(parameters(), "train", index, scans) for index in range(30))
        ]
    )
    assert visible.min() >= 0.25
    assert (visible < 1).mean() > 0.4


def test_every_digit_is_drawn_and_images_differ_in_brightness_and_contrast():
    scans = digit_scans(0)
    scenes = [generate_scene(parameters(), "train", index, scans) for index in range(20)]
    assert set(np.concatenate([scene.digits for scene in scenes])) == set(range(10))
    brightness = [scene.image.mean() for scene in scenes]
    assert np.ptp(brightness) > 50
    assert all(scene.image[scene.owner < 0].std() > 3 for scene in scenes)


def test_train_and_validation_scans_are_disjoint_and_stratified():
    scans = digit_scans(0)
    flat = {split: {scan.tobytes() for scan in scans[split][0]} for split in scans}
    assert not flat["train"] & flat["val"]
    assert len(scans["train"][0]) + len(scans["val"][0]) == 1797
    for digit in range(10):
        held_out, kept = ((scans[split][1] == digit).sum() for split in ("val", "train"))
        assert held_out / (held_out + kept) == pytest.approx(0.2, abs=0.01)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(folder, tmp_path):
    write_digits(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(folder)
    write_digits(tmp_path / "other", seed=1, **SMALL)
    assert contents(tmp_path / "other")["train2017/000000000001.png"] != contents(folder)["train2017/000000000001.png"]


def test_an_image_does_not_depend_on_how_many_there_are(folder, tmp_path):
    write_digits(tmp_path / "fewer", train_images=2, val_images=1, progress=False)
    fewer, more = contents(tmp_path / "fewer"), contents(folder)
    assert all(fewer[name] == more[name] for name in fewer if name.endswith(".png"))
    assert instances(tmp_path / "fewer", "train")["annotations"] == [
        annotation for annotation in instances(folder, "train")["annotations"] if annotation["image_id"] <= 2
    ]


def test_a_folder_that_holds_the_set_is_kept_and_recognised(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert is_digits_folder(folder, parameters())
    assert not is_digits_folder(folder, parameters(seed=1))
    assert write_digits(folder, **SMALL) is False
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    assert write_digits(tmp_path / "empty", **SMALL) is True
    assert write_digits(tmp_path / "a" / "b", **SMALL) is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_what_is_in_the_folder_is_never_overwritten(folder, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(DatasetError, match="other files"):
        write_digits(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(DatasetError, match="other parameters"):
        write_digits(folder, seed=7, **SMALL)
    with pytest.raises(DatasetError, match="found a file"):
        write_digits(tmp_path / "precious.txt", **SMALL)


def test_an_interrupted_generator_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(parameters, split, index, scans):
        if (split, index) == ("val", 1):
            raise KeyboardInterrupt
        return generate_scene(parameters, split, index, scans)

    monkeypatch.setattr(generator, "generate_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_generator_leaves_no_folder_that_looks_complete_and_does_not_hinder_the_next(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from route_detr.tools import digits\n"
        "whole = digits.scene_annotations\n"
        "def killed(scene, image_id, first_id):\n"
        "    if image_id == 3: os._exit(9)\n"
        "    return whole(scene, image_id, first_id)\n"
        "digits.scene_annotations = killed\n"
        "digits.write_digits(sys.argv[1], train_images=6, val_images=3, progress=False)\n"
    )
    out = tmp_path / "out"
    root = Path(generator.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, "-c", script, str(out)], env=environment, check=False)
    assert result.returncode == 9
    assert not out.exists()
    assert write_digits(out, **SMALL) is True
    assert len(CocoDetection(*coco_layout(out).val, TransformConfig())) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"train_images": -1}, "train_images"),
        ({"image_size": 40}, "image_size"),
        ({"digits_per_image": (0, 5)}, "digits_per_image"),
        ({"digits_per_image": (9, 5)}, "digits_per_image"),
        ({"digit_size": (4, 20)}, "digit_size"),
        ({"digits_per_image": (60, 60), "image_size": 56}, "digits_per_image"),
    ],
)
def test_bad_parameters_are_named_and_nothing_is_left(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        write_digits(tmp_path / "out", **{**SMALL, **changes})
    assert list(tmp_path.iterdir()) == []


def test_larger_crowds_get_larger_canvases(tmp_path):
    assert [generator.side_for(most) for most in (5, 25, 40, 80)] == [128, 128, 160, 224]
    words = ["data", "digits", str(tmp_path / "crowds"), "--train-images", "0", "--val-images", "2"]
    assert main([*words, "--digits", "15", "40"]) == 0
    content = json.loads((tmp_path / "crowds" / "annotations" / "instances_val2017.json").read_text())
    assert {image["width"] for image in content["images"]} == {160}
    counts = Counter(each["image_id"] for each in content["annotations"])
    assert all(15 <= count <= 40 for count in counts.values()) and len(counts) == 2
