"""Finding the files of a data set, and opening splits that fit together."""

import json

import pytest
from coco_samples import annotation, content, single_scale, with_two_images
from PIL import Image

from route_detr.data.coco import coco_layout, open_splits
from route_detr.data.report import DatasetError

TRANSFORMS = single_scale(40)


@pytest.fixture
def folder(tmp_path):
    return with_two_images(tmp_path)


@pytest.fixture
def layout_root(folder):
    root = folder / "root"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content()))
        (folder / "images").rename(root / f"{split}2017") if split == "train" else (root / "val2017").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40)).save(root / "val2017" / name)
    return root


def test_a_coco_folder_is_found_and_opened(layout_root):
    layout = coco_layout(layout_root)
    assert layout.train.annotations == layout_root / "annotations" / "instances_train2017.json"
    assert layout.val.images == layout_root / "val2017"
    train, val = open_splits(layout, TRANSFORMS, seed=2)
    assert (len(train), len(val), train.seed) == (2, 2, 2)
    assert val[0][0].shape == (3, 40, 60)


def test_explicit_paths_replace_parts_of_the_layout_or_all_of_it(layout_root, tmp_path):
    elsewhere = tmp_path / "mine.json"
    elsewhere.write_text(json.dumps(content()))
    assert coco_layout(layout_root, val_json=elsewhere).val.annotations == elsewhere
    explicit = coco_layout(
        train_json=elsewhere,
        train_images=layout_root / "train2017",
        val_json=elsewhere,
        val_images=layout_root,
    )
    assert explicit.train.images == layout_root / "train2017" and explicit.val.images == layout_root
    only_val = coco_layout(val_json=elsewhere, val_images=layout_root, splits=("val",))
    assert only_val.train is None and only_val.val.annotations == elsewhere


def test_what_was_looked_for_is_listed(layout_root, tmp_path):
    with pytest.raises(DatasetError) as error:
        coco_layout(tmp_path / "nothing")
    for part in (
        "annotations/instances_train2017.json",
        "train2017",
        "instances_val2017.json",
        "--val-images",
    ):
        assert part in str(error.value)
    with pytest.raises(DatasetError, match="--val-json: not given") as error:
        coco_layout(train_json=layout_root / "annotations" / "instances_train2017.json")
    assert "--train-images: not given" in str(error.value) and "train-json" not in str(error.value)
    with pytest.raises(ValueError, match="splits"):
        coco_layout(layout_root, splits=("test",))


def test_what_is_wrong_with_both_splits_is_one_error(layout_root):
    for split in ("train", "val"):
        path = layout_root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content(annotations=[annotation(7, image=99)])))
    with pytest.raises(DatasetError, match=r"train2017\.json: .* names 99\)\n.*val2017\.json: .* names 99\)$"):
        open_splits(coco_layout(layout_root), TRANSFORMS)


@pytest.mark.parametrize(
    ("split", "changes", "expected"),
    [
        (
            "val",
            {"categories": [{"id": 5, "name": "dog"}, {"id": 90, "name": "cow"}]},
            "id 90 is 'cat' and 'cow'",
        ),
        (
            "val",
            {"categories": [*content()["categories"], {"id": 6, "name": "hen"}]},
            "id 6 is 'absent' and 'hen'",
        ),
        ("train", {"annotations": []}, "at least one box"),
        ("val", {"annotations": [annotation(1, iscrowd=1)]}, "at least one box"),
        ("train", {"images": [], "annotations": []}, "found none in 0 images"),
    ],
)
def test_splits_that_cannot_train_together_are_refused(layout_root, split, changes, expected):
    path = layout_root / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content(**changes)))
    with pytest.raises(DatasetError, match=expected) as error:
        open_splits(coco_layout(layout_root), TRANSFORMS)
    assert str(path) in str(error.value)
