"""Reading COCO files: whatever is in one, it is read, corrected and counted, or refused before training."""

import errno
import json
import os
import pickle
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_samples import AS_STORED, annotation, content, opened, single_scale, with_two_images
from PIL import Image
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

from route_detr.data import coco, images
from route_detr.data.batches import batch_loader, collate, killed_worker
from route_detr.data.coco import CocoDetection
from route_detr.data.report import DatasetError, DatasetWarning
from route_detr.data.transforms import TransformConfig


@pytest.fixture(params=[True, False])
def headers_checked(request, monkeypatch):
    """Whether a data set reads its images' headers when it is opened, as small ones do."""
    if not request.param:
        monkeypatch.setattr(coco, "HEADERS_CHECKED_UP_TO", 0)
    return request.param


@pytest.fixture
def folder(tmp_path):
    return with_two_images(tmp_path)


def test_categories_boxes_and_sizes_are_read_and_images_without_boxes_are_kept(folder, capsys):
    dataset = opened(folder)
    assert len(dataset) == 2 and dataset.num_classes == 2 and dataset.num_boxes == 2
    assert dataset.category_ids == [5, 90] and dataset.category_names == ["dog", "cat"]
    image, target = dataset[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert target.image_id == 1 and target.size == target.original_size == (40, 60)
    assert target.labels.tolist() == [0, 1]
    torch.testing.assert_close(target.boxes, torch.tensor([[1 / 3, 3 / 8, 1 / 3, 1 / 4], [0.5, 0.5, 1.0, 1.0]]))
    _, empty = dataset[1]
    assert empty.boxes.shape == (0, 4) and empty.boxes.dtype == torch.float32
    assert empty.labels.shape == (0,) and empty.labels.dtype == torch.int64
    assert dataset.boxes(0).tolist() == [[10, 10, 30, 20], [0, 0, 60, 40]]
    assert not dataset.report
    assert dataset.coco.getImgIds() == [1, 2]
    assert capsys.readouterr().out == ""
    with pytest.raises(IndexError):
        dataset[2]


def test_size_and_original_size_differ_when_the_image_is_resized(folder):
    _, target = opened(folder, config=single_scale(80))[0]
    assert target.size == (80, 120) and target.original_size == (40, 60)


def test_crowd_regions_are_no_targets_but_stay_for_evaluation(folder):
    crowd = annotation(3, iscrowd=1, segmentation={"size": [40, 60], "counts": [0, 2400]}, area=2400)
    dataset = opened(folder, content(annotations=[annotation(1), crowd]))
    assert dataset.labels(0).tolist() == [0]
    kept = dataset.coco.loadAnns([3])[0]
    assert kept["iscrowd"] == 1 and kept["segmentation"] == crowd["segmentation"] and kept["area"] == 2400


def test_missing_area_and_iscrowd_are_filled_in_and_given_areas_stay(folder):
    dataset = opened(folder, content(annotations=[annotation(1), annotation(2, area=7.5, iscrowd=False)]))
    assert [(a["area"], a["iscrowd"]) for a in dataset.coco.loadAnns([1, 2])] == [(200.0, 0), (7.5, 0)]
    dataset = opened(folder, content(annotations=[annotation(1, area=None, iscrowd=None)]))
    assert [(a["area"], a["iscrowd"]) for a in dataset.coco.loadAnns([1])] == [(200.0, 0)]


@pytest.mark.parametrize("first_id", [0, 1])
def test_perfect_detections_reach_an_ap_of_one_even_with_an_annotation_id_of_zero(folder, first_id, capsys):
    dataset = opened(folder, content(annotations=[annotation(first_id), annotation(8, image=2, category=90)]))
    truth = dataset.coco
    perfect = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in truth.dataset["annotations"]
    ]
    assert capsys.readouterr().out == ""
    evaluation = COCOeval(truth, truth.loadRes(perfect), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_a_byte_order_mark_is_no_fault(folder):
    assert len(opened(folder, b"\xef\xbb\xbf" + json.dumps(content()).encode())) == 2


BROKEN = {
    "not JSON": ("{'images': []", ["Invalid JSON"]),
    "cut off": (json.dumps(content())[:200], ["Invalid JSON"]),
    "not text": (b"\xff\xfe\x00\x01binary", ["Invalid JSON"]),
    "nested beyond reason": ("[" * 100_000, ["Invalid JSON", "recursion limit"]),
    "a list": ([1, 2], ["Input should be an object", "[1, 2]"]),
    "no annotations": ({"images": [], "categories": []}, ["Field required", "annotations"]),
    "images no list": (content(images={"id": 1}), ["Input should be a valid array", "images is {"]),
    "no categories": (content(categories=[]), ["at least 1 item", "categories is []"]),
    "entry no object": (content(images=[3]), ["Input should be an object", "images[0] is 3"]),
    "image without id": (
        content(images=[{"file_name": "a.png"}]),
        ["Field required", "images[0].id"],
    ),
    "category id text": (
        content(categories=[{"id": "5"}]),
        ["valid integer", "categories[0].id is '5'"],
    ),
    "image id twice": (content(images=content()["images"][:1] * 2), ["images: ids that occur twice: 1 (1)"]),
    "category id twice": (
        content(categories=[{"id": 5}, {"id": 5}]),
        ["categories: ids that occur twice", "(5)"],
    ),
    "annotation id twice": (
        content(annotations=[annotation(4)] * 3),
        ["annotations: ids that occur twice: 2 (4; 4)"],
    ),
    "no file name": (
        content(images=[{"id": 1, "width": 9, "height": 9}]),
        ["Field required", "images[0].file_name"],
    ),
    "width not a number": (
        content(images=[{"id": 1, "file_name": "a.png", "width": "60", "height": 40}]),
        ["valid integer", "images[0].width is '60'"],
    ),
    "height zero": (
        content(images=[{"id": 1, "file_name": "a.png", "width": 60, "height": 0}]),
        ["greater than 0", "images[0].height is 0"],
    ),
    "unknown image": (
        content(annotations=[annotation(7, image=99)]),
        ["'image_id' names no image", "annotation 7 names 99"],
    ),
    "unknown category": (
        content(annotations=[annotation(7, category=1)]),
        ["'category_id' names no category", "annotation 7 names 1"],
    ),
    "category id a list": (
        content(annotations=[annotation(7, category=[5])]),
        ["valid integer", "annotations[0].category_id is [5]"],
    ),
    "no image id": (
        content(annotations=[{"id": 7, "category_id": 5, "bbox": [1, 1, 2, 2]}]),
        ["Field required", "annotations[0].image_id"],
    ),
    "no bbox": (
        content(annotations=[{"id": 7, "image_id": 1, "category_id": 5}]),
        ["Field required", "annotations[0].bbox"],
    ),
    "bbox of text": (content(annotations=[annotation(7, bbox=["1", 2, 3, 4])]), ["valid number", "bbox[0] is '1'"]),
    "bbox of three": (
        content(annotations=[annotation(7, bbox=[1, 2, 3])]),
        ["at least 4 items", "annotations[0].bbox is [1, 2, 3]"],
    ),
    "bbox of NaN": (
        content(annotations=[annotation(7, bbox=[1, 2, float("nan"), 4])]),
        ["finite number", "bbox[2] is nan"],
    ),
    "bbox of infinity": (
        content(annotations=[annotation(7, bbox=[1, 2, 3, float("inf")])]),
        ["finite number", "bbox[3] is inf"],
    ),
    "bbox beyond floats": (
        content(annotations=[annotation(7, bbox=[1, 2, 3, 10**400])]),
        ["finite", "annotations[0].bbox[3]"],
    ),
    "bbox null": (
        content(annotations=[annotation(7) | {"bbox": None}]),
        ["valid array", "annotations[0].bbox is None"],
    ),
    "iscrowd 2": (content(annotations=[annotation(7, iscrowd=2)]), ["should be 0 or 1", "annotations[0].iscrowd is 2"]),
    "iscrowd a list": (content(annotations=[annotation(7, iscrowd=[])]), ["should be 0 or 1", "iscrowd is []"]),
    "bbox in fractions": (
        content(annotations=[annotation(7, bbox=[0.2, 0.3, 0.5, 0.25])]),
        ["expected boxes in pixels", "annotation 7 has [0.2, 0.3, 0.5, 0.25]"],
    ),
    "area NaN": (content(annotations=[annotation(7, area=float("nan"))]), ["finite", "annotations[0].area is nan"]),
    "no image sizes": (content(images=[{"id": 1, "file_name": "a.png"}]), ["required: 2", "images[0].width"]),
    "no categories at all": ({"images": [], "annotations": []}, ["Field required: 1 (categories is missing)"]),
    "entry without height": (
        content(images=[{"id": 1, "file_name": "a.png", "width": 60}]),
        ["images[0].height is missing in {'file_name': 'a.png'"],
    ),
    "many faults": (
        content(annotations=[annotation(n, image=99) for n in range(1, 51)]),
        ["names no image of the file: 50 (first: annotation 1 names 99; annotation 2"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_annotation_file_is_one_clear_error(folder, name):
    sections, expected = BROKEN[name]
    with pytest.raises(DatasetError) as error:
        opened(folder, sections)
    message = str(error.value)
    assert message.startswith(str(folder / "instances.json"))
    assert all(part in message for part in expected), message
    assert len(message) < 600


def test_a_missing_annotation_file_or_image_folder_is_named(folder):
    with pytest.raises(DatasetError, match=r"absent\.json: expected a COCO annotation file, found none"):
        CocoDetection(folder / "absent.json", folder / "images", AS_STORED)
    with pytest.raises(DatasetError, match="found a folder"):
        CocoDetection(folder, folder / "images", AS_STORED)
    opened(folder)
    with pytest.raises(DatasetError, match="nowhere: expected the folder of the images"):
        CocoDetection(folder / "instances.json", folder / "nowhere", AS_STORED)


CORRECTED = {
    "partly outside": ([50, -5, 20, 15], "cut at the border", [50, 0, 60, 10]),
    "all outside": ([70, 10, 20, 20], "lie outside", None),
    "touching from outside": ([60, 0, 5, 5], "lie outside", None),
    "zero width": ([10, 10, 0, 5], "not positive", None),
    "negative height": ([10, 10, 5, -5], "not positive", None),
}


@pytest.mark.parametrize("name", CORRECTED)
def test_a_box_that_does_not_fit_is_cut_or_dropped_and_counted(folder, name):
    bbox, kind, expected = CORRECTED[name]
    good = [annotation(n) for n in (1, 2, 3)]
    with pytest.warns(DatasetWarning, match=kind):
        dataset = opened(folder, content(annotations=[*good, annotation(7, bbox=bbox)]))
    (counted,) = dataset.report
    assert kind in counted and len(dataset.report[counted]) == 1
    assert "annotation 7 of image 1" in str(dataset.report)
    assert dataset.boxes(0).tolist()[3:] == ([] if expected is None else [expected])
    assert (7 in dataset.coco.anns) == (expected is not None)
    if expected is not None:
        x0, y0, x1, y1 = expected
        assert dataset.coco.anns[7]["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert dataset.coco.anns[7]["area"] == (x1 - x0) * (y1 - y0)


def test_ids_are_any_integers(folder):
    images = [each | {"id": n} for each, n in zip(content()["images"], (2**64 - 1, -(2**63)), strict=True)]
    objects = [annotation(2**63 + n, image=each["id"], category=10**30) for n, each in enumerate(images)]
    dataset = opened(folder, content(images=images, annotations=objects, categories=[{"id": -1}, {"id": 10**30}]))
    (batch,) = pickle.loads(pickle.dumps(list(DataLoader(dataset, batch_size=2, collate_fn=collate))))
    assert [target.image_id for target in batch.targets] == [2**64 - 1, -(2**63)]
    assert [target.labels.tolist() for target in batch.targets] == [[1], [1]]
    assert dataset.category_ids == [-1, 10**30] and [*dataset.coco.anns] == [2**63, 2**63 + 1]


def test_categories_of_one_name_stay_apart_and_are_counted(folder):
    categories = [
        {"id": 5, "name": "bees"},
        {"id": 90, "name": "bees"},
        {"id": 91, "name": ""},
        {"id": 92, "name": None},
    ]
    with pytest.warns(DatasetWarning) as warned:
        dataset = opened(folder, content(categories=categories))
    told = f"{folder / 'instances.json'}:\nnames that several categories have, which stay apart: 1 ('bees' of [5, 90])"
    assert [str(each.message) for each in warned] == [told]  # and no word on boxes that do not fit
    assert dataset.category_names == ["bees", "bees", "91", "92"] and dataset.labels(0).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["n" * 300 + ".png", "a\0.png", "\\" * 300 + "a\0.png", "n" * 300 + "/a.png"])
def test_a_name_that_no_file_can_have_is_counted_as_any_other_missing_file(folder, name, headers_checked):
    sections = content()
    sections["images"][1]["file_name"] = name
    if name.endswith("/a.png"):  # found without its folder, but it is the other entry's
        sections["images"][1]["file_name"] = name.replace("a.png", "absent.png")
    with pytest.raises(DatasetError, match="image files that cannot be used: 1 "):
        opened(folder, sections)


def test_less_than_a_pixel_outside_is_rounding_cut_for_training_and_kept_for_evaluation(folder):
    dataset = opened(folder, content(annotations=[annotation(1, bbox=[-0.5, 10, 20, 30.4])]))
    assert not dataset.report
    torch.testing.assert_close(dataset.boxes(0), torch.tensor([[0, 10, 19.5, 40]]))
    assert dataset.coco.anns[1]["bbox"] == [-0.5, 10, 20, 30.4]


def test_only_the_first_examples_of_many_are_shown(folder):
    with pytest.warns(DatasetWarning):
        dataset = opened(folder, content(annotations=[annotation(n, bbox=[1, 1, 0, 9]) for n in range(1, 41)]))
    line = str(dataset.report)
    assert ": 40 (first: annotation 1 of" in line and "annotation 3 of" in line and "annotation 4 of" not in line


def test_corner_boxes_are_suspected_when_most_boxes_do_not_fit(folder):
    corners = [annotation(n, bbox=[30, 20, 58, 38]) for n in (1, 2, 3)]
    with pytest.warns(DatasetWarning, match="rather than COCO's x, y, width, height"):
        opened(folder, content(annotations=corners))


def test_missing_and_empty_image_files_are_one_error_up_front(folder, headers_checked):
    images = [{"id": n, "file_name": f"sub/{n}.png", "width": 60, "height": 40} for n in range(10, 30)]
    (folder / "images" / "b.png").write_bytes(b"")
    with pytest.raises(DatasetError) as error:
        opened(folder, content(images=images + content()["images"]))
    assert "of 22 images" in str(error.value)
    assert "image files that cannot be used: 21 (first: " in str(error.value)
    assert f"{folder / 'images' / 'sub' / '10.png'}" in str(error.value)


def test_images_in_subfolders_are_found(folder):
    (folder / "images" / "sub").mkdir()
    (folder / "images" / "a.png").rename(folder / "images" / "sub" / "a.png")
    sections = content()
    sections["images"][0]["file_name"] = "sub/a.png"
    assert opened(folder, sections)[0][0].shape == (3, 40, 60)


def test_a_size_that_disagrees_with_the_file_is_an_error_naming_both(folder, headers_checked):
    Image.new("RGB", (32, 24)).save(folder / "images" / "b.png")
    expected = r"b\.png: .*expected the annotation file's 60 x 40 pixels, the image has 32 x 24"
    if headers_checked:
        with pytest.raises(DatasetError, match=expected):
            opened(folder)
    else:
        dataset = opened(folder)
        with pytest.raises(DatasetError, match=expected):
            dataset[1]


def test_a_file_that_is_no_image_is_an_error_up_front(folder):
    (folder / "images" / "b.png").write_text("<html>not found</html>")
    with pytest.raises(DatasetError, match=r"b\.png: cannot be used as an image"):
        opened(folder)


@pytest.mark.parametrize(("extension", "workers"), [("png", 0), ("jpg", 0), ("png", 1)])
def test_a_truncated_image_is_an_error_that_names_it(folder, extension, workers):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = folder / "images" / f"b.{extension}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sections = content()
    sections["images"][1]["file_name"] = path.name
    loader = DataLoader(opened(folder, sections), batch_size=2, collate_fn=collate, num_workers=workers)
    with pytest.raises(DatasetError, match=rf"b\.{extension}: cannot be used as an image"):
        next(iter(loader))


AUGMENTED = TransformConfig(
    scales=(32, 40, 48), max_size=96, crop=0.5, crop_scales=(40, 50), crop_size=(20, 40), eval_scale=40
)


def fingerprint(samples):
    return [(image.shape, image.sum().item(), target.boxes.tolist()) for image, target in samples]


@pytest.fixture
def augmented(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(folder / "images" / name)
    return opened(folder, config=AUGMENTED, train=True, seed=3)


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder, augmented):
    def epoch(dataset, number, order=(0, 1)):
        dataset.set_epoch(number)
        samples = {index: dataset[index] for index in order}
        return fingerprint([samples[0], samples[1]])

    epochs = [epoch(augmented, number) for number in range(4)]
    torch.manual_seed(1)
    assert [epoch(augmented, number, order=(1, 0)) for number in range(4)] == epochs
    assert len({str(one) for one in epochs}) == 4
    other_seed = opened(folder, config=AUGMENTED, train=True, seed=4)
    assert [epoch(other_seed, number) for number in range(4)] != epochs


def test_workers_change_nothing_and_living_workers_see_the_epoch(augmented):
    alone = {}
    for epoch in (0, 1):
        augmented.set_epoch(epoch)
        alone[epoch] = fingerprint([augmented[0], augmented[1]])
    loader = DataLoader(augmented, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (1, 0):
        augmented.set_epoch(epoch)
        assert fingerprint(loader) == alone[epoch]


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_decoded_once_and_the_same(folder, augmented, workers, monkeypatch):
    augmented.set_epoch(1)
    expected = fingerprint([augmented[0], augmented[1]])
    cached = opened(folder, config=AUGMENTED, train=True, seed=3, cache=folder / "decoded")
    cached.set_epoch(1)
    assert fingerprint(DataLoader(cached, batch_size=None, num_workers=workers)) == expected
    assert len(arrays_in(folder / "decoded")) == 2
    monkeypatch.setattr(images, "read_rgb", None)
    assert fingerprint([cached[0], cached[1]]) == expected


def arrays_in(cache):
    found = [path for path in cache.rglob("*") if path.is_file()]
    assert all(path.suffix == ".npy" for path in found)
    return found


def test_one_cache_serves_sets_whose_files_have_the_same_names(tmp_path):
    seen = {}
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / name / "images").mkdir(parents=True)
        for file in ("a.png", "b.png"):
            Image.new("RGB", (60, 40), colour).save(tmp_path / name / "images" / file)
        seen[name] = opened(tmp_path / name, cache=tmp_path / "cache")
    for _ in range(2):
        assert seen["red"].raw_image(0).getpixel((9, 9)) == (255, 0, 0)
        assert seen["blue"].raw_image(0).getpixel((9, 9)) == (0, 0, 255)
    Image.new("RGB", (60, 40), "lime").save(tmp_path / "red" / "images" / "a.png")  # replaced later
    assert seen["red"].raw_image(0).getpixel((9, 9)) == (0, 255, 0)


@pytest.mark.parametrize("spoil", [b"", b"\x93NUMPY\x01", b"not an array", None, "shape", "dtype"])
def test_a_damaged_array_of_the_cache_is_made_anew(folder, spoil):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
        folder / "images" / "a.png"
    )
    dataset = opened(folder, cache=folder / "cache")
    expected = np.asarray(dataset.raw_image(0))
    (file,) = arrays_in(folder / "cache")
    whole = file.read_bytes()
    if spoil == "shape":
        np.save(file, expected[:-1])
    elif spoil == "dtype":
        np.save(file, expected.astype(np.int8))
    else:
        file.write_bytes(whole[:-100] if spoil is None else spoil)
    np.testing.assert_array_equal(dataset.raw_image(0), expected)
    assert arrays_in(folder / "cache") == [file] and file.read_bytes() == whole


@pytest.mark.parametrize("absolute", [True, False])
def test_names_that_leave_the_folder_are_read_there_and_cached_in_the_cache(folder, absolute):
    (folder / "elsewhere").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "elsewhere" / "a.png")
    sections = content()
    sections["images"][0]["file_name"] = str(folder / "elsewhere" / "a.png") if absolute else "../elsewhere/a.png"
    dataset = opened(folder, sections, cache=folder / "cache")
    for _ in range(2):
        assert dataset.raw_image(0).getpixel((0, 0)) == (255, 0, 0)
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["a.png"]
    assert len(arrays_in(folder / "cache")) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_cannot_be_made_is_one_sentence(folder, workers, monkeypatch):
    dataset = opened(folder, cache=folder / "cache")

    def refuse(*_, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"^\S+cache\S+npy: cannot be written: Permission denied$"):
        list(batch_loader(dataset, [[0]], workers))


def test_a_cache_that_is_a_file_is_told(folder):
    with pytest.raises(DatasetError, match=r"cache: expected a folder, .*a\.png is a file"):
        opened(folder, cache=folder / "images" / "a.png")


def test_a_backslash_is_a_separator_unless_a_file_has_it_in_its_name(folder, headers_checked):
    (folder / "images" / "sub").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "images" / "sub" / "a.png")
    sections = content()
    sections["images"][0]["file_name"] = "sub\\a.png"
    assert opened(folder, sections).raw_image(0).getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGB", (60, 40), "blue").save(folder / "images" / "sub\\a.png")
    assert opened(folder, sections).raw_image(0).getpixel((0, 0)) == (0, 0, 255)
    sections["images"][0]["file_name"] = "sub\\none.png"
    with pytest.raises(DatasetError, match=r"sub/none\.png: .*[Nn]o such file"):
        opened(folder, sections)


@pytest.mark.parametrize("prefix", ["images\\", "images/", "some/where/"])
def test_a_name_is_found_without_a_folder_that_is_not_there(folder, prefix):
    sections = content()
    for image in sections["images"]:
        image["file_name"] = prefix + image["file_name"]
    with pytest.warns(DatasetWarning, match=f"found without it: {len(sections['images'])}"):
        dataset = opened(folder, sections)
    assert dataset.raw_image(0).size == (60, 40)
    sections["images"][1]["file_name"] = f"other/{sections['images'][0]['file_name'][len(prefix) :]}"
    with pytest.raises(DatasetError, match=r"such file"):
        opened(folder, sections)
    (folder / "images" / prefix.rstrip("/\\")).mkdir(parents=True)  # now the name means a file in it
    with pytest.raises(DatasetError, match=r"such file"):
        opened(folder, sections)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence_from_a_worker_too(folder, workers):
    path = folder / "images" / "b.png"
    Image.effect_noise((60, 40), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:600])
    batches = batch_loader(opened(folder), [[0], [0, 1]], workers)
    assert len(next(batches)) == 1
    with pytest.raises(DatasetError, match=r"b\.png: cannot be used as an image: ") as told:
        next(batches)
    assert len(str(told.value)) < len(str(path)) + 120 and "\n" not in str(told.value)


def test_a_killed_worker_is_one_sentence(folder):
    class Killed(CocoDetection):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    dataset = opened(folder)
    dataset.__class__ = Killed
    with pytest.raises(RuntimeError) as raised:
        next(batch_loader(dataset, [[0]], 1))
    assert re.fullmatch(
        r"a process that reads images \(pid \d+\) was killed( by signal: Killed)?, most often because memory .*workers",
        killed_worker(raised.value),
    )
    assert killed_worker(RuntimeError("another")) is None
    full = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
    )
    assert "(pid 7) was killed by signal: Bus error, shared memory is full" in killed_worker(RuntimeError(full))
    assert "(pid 7, 8) was killed, most" in killed_worker(
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
    )


def test_a_data_set_can_be_pickled_for_spawned_workers(augmented):
    assert len(augmented.coco.anns) == 2
    again = pickle.loads(pickle.dumps(augmented))
    assert fingerprint([again[0]]) == fingerprint([augmented[0]])
    assert len(again.coco.anns) == 2


def test_the_order_of_categories_and_annotations_in_the_file_does_not_matter(folder):
    flipped = content(categories=content()["categories"][::-1])
    assert opened(folder, flipped).category_ids == opened(folder).category_ids == [5, 90]
