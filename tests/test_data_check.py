"""`route-detr data check`: one reading tells sizes, classes, crowding and every fault of a data set."""

import json

import numpy as np
import pytest
from coco_samples import annotation
from PIL import Image
from small_training import write_data

from route_detr.cli import main
from route_detr.data.check import as_text, check_data
from route_detr.data.coco import coco_layout


@pytest.fixture
def root(tmp_path):
    return write_data(tmp_path / "coco")


def edited(root, split, edit):
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def checked(root, **options):
    return check_data(coco_layout(root), workers=1, **options)


def test_sizes_classes_and_crowding_are_those_of_the_files(root):
    Image.new("RGB", (80, 50)).save(root / "train2017" / "1.png")

    def crowded(content):
        content["images"][0] |= {"width": 80, "height": 50}
        kept = [each for each in content["annotations"] if each["image_id"] > 2]
        boxes = [(0, 0, 20, 20), (1, 0, 20, 20), (60, 30, 20, 20), (0, 0, 21, 45)]  # two overlap by more than a half
        kept += [annotation(100 + n, 1, 7, box) for n, box in enumerate(boxes)]
        kept.append(annotation(200, 1, 90, (0, 0, 80, 50), iscrowd=1))
        content["annotations"] = kept
        content["categories"].append({"id": 8, "name": "nothing"})

    edited(root, "train", crowded)
    edited(root, "val", lambda content: content["categories"].append({"id": 8, "name": "nothing"}))
    found = checked(root)
    train = found["train"]
    assert found["trainable"] and not train["faults"] and not train["corrected"]
    assert (train["num_images"], train["images_without_objects"]) == (7, 1)
    assert (train["num_objects"], train["crowd_regions"]) == (19, 1)
    assert train["width"] == {"min": 64, "median": 64, "p95": 80, "max": 80} and train["height"]["min"] == 50
    assert train["objects_per_image"] == {"min": 0, "median": 3, "p95": 4, "max": 4}
    assert train["most_crowded"] == "1.png" and train["small_medium_large"] == [19, 0, 0]
    assert sum(train["classes"].values()) == 19 and train["classes"]["nothing"] == 0
    boxes = {}
    for each in json.loads((root / "annotations" / "instances_train2017.json").read_text())["annotations"]:
        if not each.get("iscrowd"):
            boxes.setdefault(each["image_id"], []).append(each["bbox"])
    assert train["overlapping"] == sum(overlapping(each) for each in boxes.values()) >= 2


def overlapping(boxes):
    boxes = np.array(boxes, dtype=float)
    ends = boxes[:, :2] + boxes[:, 2:]
    shared = np.minimum(ends[:, None], ends) - np.maximum(boxes[:, None, :2], boxes[:, :2])
    shared = shared.clip(0).prod(-1)
    areas = boxes[:, 2:].prod(-1)
    iou = shared / (areas[:, None] + areas - shared)
    return int((iou > 0.5).any(1, where=~np.eye(len(boxes), dtype=bool)).sum())


def test_every_fault_of_annotations_and_pictures_is_found_in_one_reading(root, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train2017" / "2.png", exif=b"Exif\0\0rubbish")
    Image.fromarray(noise).save(root / "train2017" / "3.png")
    cut = root / "train2017" / "3.png"
    cut.write_bytes(cut.read_bytes()[:3000])  # its header is whole
    (root / "train2017" / "4.png").unlink()

    def spoil(content):
        content["annotations"] += [annotation(500, 99, 7), annotation(501, 1, 3), annotation(502, 1, 7, (0, 0, 0, 5))]
        content["images"].append(content["images"][4] | {"id": 70})
        content["images"].append({"id": 71, "file_name": "../val2017/1.png", "width": 64, "height": 64})

    edited(root, "train", spoil)
    edited(root, "val", lambda content: content["categories"][0].update(name="circle"))
    report = tmp_path / "report.json"
    assert main(["data", "check", str(root), "--workers", "1", "--json", str(report)]) == 1
    shown = capsys.readouterr()
    assert shown.err == "" and len(shown.out.splitlines()) < 45
    found = json.loads(report.read_text())
    assert not found["trainable"]
    train, val = found["train"], found["val"]
    unusable = train["faults"]["image files that cannot be used"]
    assert len(unusable) == 2 and "3.png" in unusable[0] and "4.png: " in unusable[1]
    assert {kind: len(examples) for kind, examples in train["faults"].items()} == {
        "annotations whose 'image_id' names no image of the file": 1,
        "annotations whose 'category_id' names no category of the file": 1,
        "image files that cannot be used": 2,
    }
    assert {kind: len(examples) for kind, examples in train["corrected"].items()} == {
        "boxes dropped because their width or height is not positive": 1,
        "image files that several entries name": 1,
        "EXIF blocks that cannot be read, ignored": 1,
    }
    assert val["faults"] == {"categories that differ from the training set's": ["id 7 is 'circle', there 'square'"]}
    assert list(val["corrected"]) == ["image files of the training set too"]
    for kind in (*train["faults"], *train["corrected"], *val["faults"], *val["corrected"]):
        assert kind in shown.out
    assert "cannot be trained on" in shown.out
    assert main(["data", "check", str(root), "--workers", "1", "--json", str(report)]) == 1  # its own file is replaced


def test_categories_of_one_name_and_names_that_no_file_can_have_are_told(root, capsys):
    def spoil(content):
        content["categories"][1]["name"] = "square"
        content["categories"].append({"id": 91, "name": "two\nlines"})
        content["images"][0]["file_name"], content["images"][1]["file_name"] = "a\0.png", "n" * 300 + ".png"

    edited(root, "train", spoil)
    table = json.loads((root / "annotations" / "instances_train2017.json").read_text())["categories"]
    edited(root, "val", lambda content: content.update(categories=table))
    assert main(["data", "check", str(root), "--workers", "1"]) == 1
    shown = capsys.readouterr().out
    assert "2 x image files that cannot be used" in shown and "without an object: two lines" in shown
    train = checked(root)["train"]
    assert train["classes"].keys() == {"square (7)", "square (90)", "two\nlines"}
    assert sum(train["classes"].values()) == 21
    assert list(train["corrected"]) == ["names that several categories have, which stay apart"]


def test_what_cannot_be_checked_is_bad_input(root, tmp_path, capsys):
    assert main(["data", "check"]) == 2 == main(["data", "check", str(tmp_path / "nowhere")])
    assert main(["data", "check", str(root), "--workers", "0"]) == 2
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    assert main(["data", "check", str(root), "--json", str(mine)]) == 2 and mine.read_text() == "{}"
    assert all(line.startswith("route-detr: error: ") for line in capsys.readouterr().err.splitlines())


def test_masks_are_asked_for_where_they_are_trained(root):
    found = checked(root)
    assert found["trainable"] and as_text(found).endswith("can be trained on, without masks (--masks reads them too)")
    assert as_text(found | {"masks": True}).endswith("can be trained on")
    assert not checked(root, masks=True)["trainable"]
