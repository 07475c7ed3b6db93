"""Segmentations: one becomes the mask that is meant, or a fault that names it; pycocotools sees no other."""

import numpy as np
import pytest
from coco_samples import annotation, content, opened, with_two_images
from pycocotools import mask as rle

from route_detr.data.annotations import inspect_annotations, pixel_sums
from route_detr.data.report import DatasetError, DatasetWarning

TRIANGLE = [10, 10, 30, 10, 10, 20]


@pytest.fixture
def folder(tmp_path):
    return with_two_images(tmp_path)


def masked(folder, *segmentations, **more):
    """A set of one object for each segmentation; None stands for none."""
    given = [{} if each is None else {"segmentation": each} for each in segmentations]
    objects = [annotation(7 + n, bbox=[10, 10, 20, 10], **each, **more) for n, each in enumerate(given)]
    return opened(folder, content(annotations=[*objects, annotation(1, segmentation=[TRIANGLE])]), masks=True)


def encoded(height, width, seed=0):
    return rle.encode(np.asfortranarray(np.random.default_rng(seed).integers(0, 2, (height, width), dtype=np.uint8)))


def of_size(height, width, size=(40, 60)):
    """Run lengths of a random mask, with another size written beside them."""
    return {"size": [*size], "counts": encoded(height, width)["counts"].decode()}


pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools' own, on NumPy 2

FAULTS = {
    "none": (
        None,
        "polygons of three or more points, or run lengths, of each object: 1 (annotation 7 of image 1: None",
    ),
    "empty object": ({}, "of each object: 1 (annotation 7 of image 1: {}"),
    "text": ("text", "expected a segmentation: polygons [[x, y, x, y, ...], ...] or run lengths"),
    "flat": ([1, 2, 9, 2, 9, 9], "run lengths with 'size' and 'counts': 1 (annotation 7 of image 1: [1, 2, 9, 2"),
    "number": (5, "run lengths with 'size' and 'counts': 1 (annotation 7 of image 1: 5"),
    "no size": ({"counts": [2400]}, "run lengths with 'size' and 'counts': 1 (annotation 7 of image 1"),
    "size a number": ({"size": 40, "counts": [2400]}, "run lengths with 'size' and 'counts': 1 (annotation 7"),
    "no counts": ({"size": [40, 60]}, "run lengths with 'size' and 'counts': 1 (annotation 7 of image 1"),
    "letters": ([["a"] * 6], "polygons of finite numbers up to 2^53: 1 (annotation 7 of image 1: ['a', 'a'"),
    "digits in quotes": ([["1"] * 6], "polygons of finite numbers up to 2^53: 1 (annotation 7 of image 1"),
    "nested": ([[[1, 2], [9, 2], [9, 9], [5, 5], [4, 4], [3, 3]]], "polygons of finite numbers"),
    "ragged": ([[1, [2], 3, 4, 5, 6]], "polygons of finite numbers"),
    "not a number": ([[1, 2, 9, 2, float("nan"), 9]], "polygons of finite numbers up to 2^53: 1 (annotation 7"),
    "infinite": ([TRIANGLE, [1, 2, 9, 2, float("-inf"), 9]], "polygons of finite numbers"),
    "beyond floats": ([[1, 2, 9, 2, 10**400, 9]], "polygons of finite numbers"),
    "an endless outline": ([[-4000, -4000, 4000, 4000] * 4000], "outline of at most 2^24 pixels"),
    "turned": (
        {"size": [60, 40], "counts": [2400]},
        "the image's size: 1 (annotation 7 of image 1: 40 x 60 in 60 x 40",
    ),
    "turned, compressed": (of_size(60, 40, (60, 40)), "1 (annotation 7 of image 1: 40 x 60 in 60 x 40"),
    "too short": (of_size(20, 30), "the image's size: 1 (annotation 7 of image 1: 600 pixels in 60 x 40"),
    "too long": (of_size(80, 120), "the image's size: 1 (annotation 7 of image 1: 9600 pixels in 60 x 40"),
    "no lengths": ({"size": [40, 60], "counts": ""}, "annotation 7 of image 1: 0 pixels in 60 x 40"),
    "list too short": ({"size": [40, 60], "counts": [9]}, "annotation 7 of image 1: 9 pixels in 60 x 40"),
    "list past 64 bits": (
        {"size": [40, 60], "counts": [2**62] * 4 + [2400]},
        "are damaged: 1 (annotation 7 of image 1",
    ),
    "list negative": ({"size": [40, 60], "counts": [2405, -5]}, "are damaged: 1 (annotation 7 of image 1: [2405, -5]"),
    "list of halves": ({"size": [40, 60], "counts": [2.5, 2397.5]}, "are damaged"),
    "list of text": ({"size": [40, 60], "counts": ["2400"]}, "are damaged"),
    "cut inside a number": ({"size": [40, 60], "counts": "0P["}, "are damaged: 1 (annotation 7 of image 1: b'0P['"),
    "no alphabet": ({"size": [40, 60], "counts": "0P[2\u00e9"}, "are damaged"),
    "a lone surrogate": ({"size": [40, 60], "counts": "\ud800"}, "Invalid JSON"),
    "negative": ({"size": [40, 60], "counts": "1P[2O"}, "are damaged: 1 (annotation 7 of image 1: b'1P[2O'"),
    "endless number": ({"size": [40, 60], "counts": "P" * 40 + "0"}, "are damaged"),
}


@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_a_segmentation_that_is_no_mask_of_its_image_is_one_error_that_names_it(folder, name, crowd):
    segmentation, expected = FAULTS[name]
    if crowd and "of each object" in expected:
        with pytest.warns(DatasetWarning, match="crowd regions without a segmentation"):
            assert masked(folder, segmentation, iscrowd=1).num_boxes == 1
        return
    with pytest.raises(DatasetError) as error:
        masked(folder, segmentation, iscrowd=crowd)
    assert str(error.value).startswith(f"{folder / 'instances.json'}: ")
    assert expected in str(error.value)
    assert opened(folder, content(annotations=[annotation(7, segmentation=5)])).num_boxes == 1  # without masks


def test_all_faults_are_one_error_with_their_counts(folder):
    sections = content(
        images=[
            *content()["images"],
            content()["images"][0],
            {"id": "3", "file_name": "c.png", "width": 6, "height": 4},
        ],
        annotations=[
            *(annotation(n, segmentation={}) for n in range(1, 6)),
            annotation(6, category=1, segmentation=[TRIANGLE]),
            annotation(8, bbox=[1, 2, 3], segmentation=[TRIANGLE]),
            annotation(8, segmentation=of_size(24, 32)),
            annotation(9, segmentation=[TRIANGLE, [1, 1]]),
            annotation(9, bbox=[70, 70, 9, 9]),
        ],
    )
    with pytest.raises(DatasetError) as error:
        opened(folder, sections, masks=True)
    lines = str(error.value).removeprefix(f"{folder / 'instances.json'}: ").splitlines()
    assert [line.split(" (")[0].rsplit(": ", 1)[1] for line in lines] == ["1", "1", "1", "1", "1", "5", "1"]
    for expected in ("images[3].id is '3'", "annotations[6].bbox is [1, 2, 3]", "images: ids that occur twice: 1 (1)"):
        assert expected in str(error.value)
    assert "annotations: ids that occur twice: 1 (9)" in lines
    assert "names no category of the file: 1 (annotation 6 names 1)" in str(error.value)
    assert "of each object: 5 (first: annotation 1 of image 1: {}; annotation 2" in str(error.value)
    assert "annotation 8 of image 1: 768 pixels in 60 x 40" in str(error.value)
    found = inspect_annotations(folder / "instances.json", masks=True)
    assert len(found.faults) == 7 and [len(examples) for examples in found.report.values()] == [1, 1]
    assert [len(part) for part in (found.images, found.categories)] == [3, 2]
    assert [each["id"] for each in found.annotations] == [1, 2, 3, 4, 5, 8, 9]


def test_an_entry_that_is_at_fault_itself_is_not_called_unknown(folder):
    sections = content(images=[{"id": 1, "file_name": "a.png", "width": 0, "height": 40}, content()["images"][1]])
    with pytest.raises(DatasetError) as error:
        opened(folder, sections)
    assert "images[0].width is 0" in str(error.value) and "names no image" not in str(error.value)


def test_run_lengths_are_added_up_as_pycocotools_reads_them():
    rng = np.random.default_rng(0)
    texts, sums = [], []
    for height, width in rng.integers(1, 90, (300, 2)).tolist():
        mask = rng.random((height, width)) < rng.choice([0, 0.01, 0.5, 1])
        texts.append(rle.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])
        sums.append(height * width)
    wide = [0, 2**31 - 2, 1], [2**30, 5, 2**30 - 6], [7] * 1000
    texts += [rle.frPyObjects({"size": [1, sum(each)], "counts": each}, 1, sum(each))["counts"] for each in wide]
    sums += map(sum, wide)
    damaged = [b"P", b"0" + bytes([200]), b"O", b"\x00", b"p" * 30]
    order = rng.permutation(len(texts) + len(damaged))
    found = pixel_sums([(texts + damaged)[n] for n in order])
    assert found.tolist() == [(sums + [-1] * len(damaged))[n] for n in order]
    assert pixel_sums([b""]).tolist() == [0]


def drawn(folder, *segmentations):
    return masked(folder, *segmentations).masks(0)[..., 0].astype(bool)


def as_pycocotools_draws(polygons, size=(40, 60)):
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size))).astype(bool)


@pytest.mark.parametrize("reach", [0, 5, 100, 3900])
def test_polygons_near_their_image_are_drawn_as_pycocotools_draws_them(folder, reach):
    rng = np.random.default_rng(reach)
    for count in range(3, 9):
        polygon = (rng.random((count, 2)) * (np.array([60, 40]) + 2 * reach) - reach).round(2).ravel().tolist()
        np.testing.assert_array_equal(drawn(folder, [polygon, TRIANGLE]), as_pycocotools_draws([polygon, TRIANGLE]))


@pytest.mark.parametrize("scale", [2e4, 6e4])
def test_polygons_that_reach_far_are_cut_and_their_part_of_the_image_stays(folder, scale):
    rng = np.random.default_rng(0)
    for count in range(3, 9):
        polygon = (rng.standard_normal((count, 2)) * scale).ravel().tolist()
        polygon[:2] = [30, 20]
        with pytest.warns(
            DatasetWarning, match="polygons cut 4096 pixels outside their image: 1 .annotation 7 of image 1"
        ):
            found = drawn(folder, [polygon])
        assert (found != as_pycocotools_draws([polygon])).mean() < 0.02


@pytest.mark.parametrize("far", [5e7, 2e8, 3.4e9, 2.0**53])
def test_polygons_that_end_nowhere_are_cut(folder, far):
    with pytest.warns(DatasetWarning, match="polygons cut 4096 pixels outside"):
        assert drawn(folder, [[-far, -far, far, -far, far, far, -far, far]]).all()
    with pytest.warns(DatasetWarning, match="polygons cut 4096 pixels outside"):
        left = drawn(folder, [[30, -far, 30, far, -far, far, -far, -far]])
    assert left[:, :30].all() and not left[:, 30:].any()
    with pytest.warns(DatasetWarning, match="polygons cut 4096 pixels outside"):
        assert not drawn(folder, [[far, far, far, far / 2, far / 2, far]]).any()


def test_parts_that_have_no_area_are_left_out_and_counted(folder):
    expected = as_pycocotools_draws([TRIANGLE])
    for part in ([], [5, 5, 5, 9], [1, 2, 3], [5, 5, 5, 9, 7]):
        with pytest.warns(DatasetWarning, match="left out because they have fewer than three points: 2"):
            found = drawn(folder, [part, TRIANGLE, part])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 2, 3, 4]], [[5, 5], [1, 2, 3]]])
def test_an_object_without_a_polygon_is_ignored_and_counted(folder, segmentation):
    with pytest.warns(DatasetWarning, match="ignored as crowd regions are: 1 .annotation 7 of image 1"):
        dataset = masked(folder, segmentation)
    assert dataset.num_boxes == 1 and dataset.masks(0).shape[-1] == 1
    region = dataset.coco.anns[7]
    assert region["iscrowd"] == 1 and rle.area(region["segmentation"]) == 200
    boxes = opened(folder, content(annotations=[annotation(7, segmentation=segmentation)]))  # masks are not wanted
    assert boxes.num_boxes == 1 and not boxes.report


def test_the_last_of_an_odd_number_of_values_is_ignored_and_counted(folder):
    with pytest.warns(DatasetWarning, match="odd number of values, whose last is ignored: 1"):
        np.testing.assert_array_equal(drawn(folder, [[*TRIANGLE, 99]]), as_pycocotools_draws([TRIANGLE]))


def test_pycocotools_gets_no_crowd_region_without_a_mask(folder):
    with pytest.warns(DatasetWarning, match="crowd regions without a segmentation, for which their box stands: 1"):
        dataset = masked(folder, None, iscrowd=1)
    assert dataset.num_boxes == 1
    region = rle.decode(dataset.coco.anns[7]["segmentation"])
    assert region[10:20, 10:30].all() and region.sum() == 200


def test_masks_without_a_pixel_are_counted(folder):
    outside = [[70, 50, 90, 50, 90, 60]]
    with pytest.warns(DatasetWarning, match="masks without a pixel of their image: 2 .annotation 7 of image 1; annot"):
        assert not drawn(folder, outside, {"size": [40, 60], "counts": [2400]}).any()


def test_an_image_may_hold_hundreds_of_masks(folder):
    assert masked(folder, *[[TRIANGLE]] * 299).masks(0).shape == (40, 60, 300)
