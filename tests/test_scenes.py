"""Rendered scenes: masks, boxes and classes belong together, a scene depends on seed, split and number alone."""

import builtins
import json

import numpy as np
import pytest
from pycocotools import mask as rle

from route_detr.cli import main
from route_detr.data.coco import CocoDetection
from route_detr.data.report import DatasetError
from route_detr.data.transforms import TransformConfig
from route_detr.errors import UsageError
from route_detr.tools import scenes
from route_detr.tools.scenes import CLASSES, LEAST_PIXELS, MAPS, Scene, render_scene, scene_annotations, write_scenes


def test_no_map_is_in_both_splits():
    assert not set(MAPS["train"]) & set(MAPS["val"]) and len(set(CLASSES)) == len(CLASSES)


def test_annotations_are_those_of_the_masks():
    masks = np.zeros((2, 240, 320), dtype=bool)
    masks[0, 10:30, 5:15], masks[1, 100:103, 200:260] = True, True
    found = scene_annotations(Scene(np.zeros((240, 320, 3), np.uint8), masks, [3, 11]), image_id=7, first_id=5)
    assert [(each["id"], each["image_id"], each["category_id"]) for each in found] == [(5, 7, 4), (6, 7, 12)]
    assert [each["bbox"] for each in found] == [[5, 10, 10, 20], [200, 100, 60, 3]]
    assert [each["area"] for each in found] == [200, 180]
    assert (rle.decode(found[0]["segmentation"]) == masks[0]).all()
    assert scene_annotations(Scene(np.zeros((240, 320, 3), np.uint8), masks[:0], []), 1, 1) == []


def test_without_vizdoom_one_sentence_says_what_to_install(monkeypatch, tmp_path, capsys):
    there = builtins.__import__

    def absent(name, *rest, **more):
        if name == "vizdoom":
            raise ImportError("No module named 'vizdoom'")
        return there(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(["data", "scenes", str(tmp_path / "out")]) == 2
    assert 'pip install "route-kernels[scenes]"' in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_bad_number_is_named(tmp_path):
    with pytest.raises(UsageError, match="val_images: expected at least 0, got -1"):
        write_scenes(tmp_path / "out", val_images=-1)


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("vizdoom")
    engine = scenes.game()
    engine.init()
    yield engine
    engine.close()


def test_a_scene_depends_on_nothing_but_its_number(engine):
    first = render_scene(engine, 3, "val", 1)
    other = render_scene(engine, 3, "train", 1)
    again = render_scene(engine, 3, "val", 1)
    assert (first.image == again.image).all() and (first.masks == again.masks).all() and first.labels == again.labels
    assert (first.image != other.image).any()


def test_masks_are_apart_and_large_enough(engine):
    for index in range(3):
        scene = render_scene(engine, 0, "train", index)
        assert len(scene.masks) == len(scene.labels) > 0 and scene.image.shape == (240, 320, 3)
        assert scene.masks.sum(0).max() == 1 and scene.masks.sum((1, 2)).min() >= LEAST_PIXELS


def test_a_folder_is_one_of_coco_and_is_not_written_twice(tmp_path, capsys):
    pytest.importorskip("vizdoom")
    out = tmp_path / "scenes"
    command = ["data", "scenes", str(out), "--train-images", "2", "--val-images", "1", "--seed", "4"]
    assert main(command) == 0 and main(command) == 0
    assert capsys.readouterr().out.splitlines() == [f"written to {out}", f"already in {out}"]
    for split, count in (("train", 2), ("val", 1)):
        file = out / "annotations" / f"instances_{split}2017.json"
        data = CocoDetection(file, out / f"{split}2017", TransformConfig(), masks=True)
        assert len(data) == count and data.category_names == list(CLASSES) and data.num_classes == 12
        assert all(data.masks(index).shape[2] == len(data.boxes(index)) for index in range(count))
    assert json.loads((out / "scenes.json").read_text())["seed"] == 4
    with pytest.raises(DatasetError, match="holds scenes with other parameters"):
        write_scenes(out, seed=5)
    assert main(["data", "check", str(out), "--masks"]) == 0
