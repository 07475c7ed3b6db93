"""Cityscapes' official folders become a COCO folder: classes, instances, groups, and what is missing is named."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from route_detr.cli import main
from route_detr.data.coco import coco_layout, open_splits
from route_detr.data.report import DatasetError
from route_detr.data.transforms import TransformConfig
from route_detr.tools.cityscapes import write_cityscapes

HEIGHT, WIDTH = 32, 64
NAMES = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]


def picture(root, split, name, *regions):
    """An image of a city, and its instance ids: `regions` are (id, x, y, w, h) on a road (7)."""
    city = name.split("_")[0]
    ids = np.full((HEIGHT, WIDTH), 7, dtype=np.uint16)
    for number, x, y, w, h in regions:
        ids[y : y + h, x : x + w] = number
    for folder, suffix, pixels in (
        ("leftImg8bit", "leftImg8bit", np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)),
        ("gtFine", "gtFine_instanceIds", ids),
    ):
        path = root / folder / split / city / f"{name}_{suffix}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "cityscapes"
    picture(root, "train", "aachen_000000_000019", (26000, 4, 6, 10, 8), (26001, 30, 6, 5, 5), (24, 50, 0, 14, 8))
    picture(
        root, "train", "ulm_000001_000019", (33000, 0, 0, 4, 4), (29000, 20, 20, 9, 9)
    )  # 29: caravan, no thing here
    picture(root, "val", "bonn_000000_000019", (24000, 8, 8, 6, 12), (25000, 9, 4, 3, 3))
    return root


def test_things_become_annotations_with_masks_and_groups_become_crowds(root, tmp_path):
    assert write_cityscapes(root, tmp_path / "out", workers=1) == {"train": 4, "val": 2}
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train2017.json").read_text())
    assert [category["name"] for category in content["categories"]] == NAMES
    assert [image["file_name"] for image in content["images"]] == [
        "aachen/aachen_000000_000019_leftImg8bit.png",
        "ulm/ulm_000001_000019_leftImg8bit.png",
    ]
    assert all((image["width"], image["height"]) == (WIDTH, HEIGHT) for image in content["images"])
    group, first, second, bicycle = content["annotations"]
    assert (group["category_id"], group["iscrowd"], group["bbox"]) == (24, 1, [50, 0, 14, 8])
    assert (first["category_id"], first["iscrowd"], first["bbox"], first["area"]) == (26, 0, [4, 6, 10, 8], 80)
    assert (second["bbox"], second["image_id"]) == ([30, 6, 5, 5], 1)
    assert (bicycle["category_id"], bicycle["image_id"]) == (33, 2)
    mask = rle.decode(first["segmentation"])
    assert mask.shape == (HEIGHT, WIDTH) and mask[6:14, 4:14].all() and mask.sum() == 80


def test_the_folder_opens_with_masks(root, tmp_path):
    write_cityscapes(root, tmp_path / "out", workers=1)
    as_stored = TransformConfig(flip=0.0, scales=(HEIGHT,), max_size=WIDTH, crop=0.0, eval_scale=HEIGHT)
    train, val = open_splits(coco_layout(tmp_path / "out"), as_stored, masks=True)
    assert train.category_names == NAMES and (len(train), len(val)) == (2, 1)
    _, target = train[0]
    assert target.labels.tolist() == [2, 2]
    assert target.masks.sum((1, 2)).tolist() == [80, 25]
    assert val.coco.getAnnIds(iscrowd=False) == [1, 2]


def test_the_command_line_converts(root, tmp_path, capsys):
    assert main(["data", "cityscapes", str(root), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "4 train, 2 val" in printed
    assert (tmp_path / "out" / "val2017" / "bonn").is_dir()


def test_what_is_missing_is_named_and_nothing_is_left(root, tmp_path):
    (root / "gtFine" / "val" / "bonn" / "bonn_000000_000019_gtFine_instanceIds.png").unlink()
    with pytest.raises(DatasetError, match=r"of 1 images of val:\nfiles of instance ids missing: 1 \(.*bonn"):
        write_cityscapes(root, tmp_path / "out", workers=1)
    with pytest.raises(DatasetError, match=r"leftImg8bit/train: expected a folder of each city"):
        write_cityscapes(tmp_path, tmp_path / "out", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cityscapes"]


def test_what_is_in_the_folder_is_never_overwritten(root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(DatasetError, match="found other files"):
        write_cityscapes(root, tmp_path / "out", workers=1)
