"""Transforms keep boxes on their objects and draw from the given generator only; batches are padded."""

import numpy as np
import pytest
import torch
from PIL import Image

from route_detr.data import Batch, Target, TransformConfig, collate, eval_transforms, train_transforms
from route_detr.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Scene,
    crop,
    mirror,
    normalised,
    normalised_boxes,
    resize,
    resized_shape,
)

DETR = TransformConfig()


def scene(width=200, height=100, boxes=((20, 10, 80, 60), (150, 50, 200, 100)), labels=None):
    """A black image with a white rectangle in place of each box."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 255
    labels = np.arange(len(boxes)) if labels is None else np.array(labels)
    return Scene(Image.fromarray(pixels), np.array(boxes, dtype=np.float64).reshape(-1, 4), labels.astype(np.int64))


def bounds_of_white(image: Image.Image) -> np.ndarray:
    rows, columns = np.nonzero(np.asarray(image)[:, :, 0] > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize(
    ("shape", "shorter", "max_size", "expected"),
    [
        ((640, 480), 800, 1333, (1067, 800)),
        ((480, 640), 800, 1333, (800, 1067)),
        ((1000, 400), 800, 1333, (1333, 533)),
        ((128, 128), 128, 213, (128, 128)),
        ((1, 5000), 800, 1333, (1, 1333)),
        ((1, 1), 800, 1333, (800, 800)),
    ],
)
def test_resized_shape_keeps_the_aspect_ratio_within_the_longest_side(shape, shorter, max_size, expected):
    assert resized_shape(*shape, shorter, max_size) == expected


def test_resize_scales_boxes_and_leaves_an_image_of_that_shape_untouched():
    original = scene()
    assert resize(original, (200, 100)) is original
    resized = resize(original, (400, 150))
    assert resized.image.size == (400, 150)
    assert resized.boxes.tolist() == [[40, 15, 160, 90], [300, 75, 400, 150]]


def test_mirror_moves_boxes_with_their_pixels_and_twice_is_the_original():
    once = mirror(scene(boxes=[(20, 10, 80, 60)]))
    assert once.boxes.tolist() == [[120, 10, 180, 60]]
    assert bounds_of_white(once.image).tolist() == [120, 10, 180, 60]
    twice = mirror(mirror(scene()))
    assert np.array_equal(twice.boxes, scene().boxes)
    assert twice.image.tobytes() == scene().image.tobytes()


def test_crop_clips_boxes_and_drops_those_without_area_with_their_labels():
    cropped = crop(scene(labels=[7, 3]), 50, 0, 100, 50)
    assert cropped.image.size == (100, 50)
    assert cropped.boxes.tolist() == [[0, 10, 30, 50]]
    assert cropped.labels.tolist() == [7]
    assert crop(scene(), 80, 0, 70, 50).boxes.shape == (0, 4)


@pytest.mark.parametrize("seed", range(12))
def test_detr_augmentation_keeps_the_box_on_its_object(seed):
    small = TransformConfig(scales=(90, 120), max_size=260, crop=0.7, crop_scales=(80, 150), crop_size=(60, 110))
    result = train_transforms(small)(scene(boxes=[(60, 20, 140, 80)]), np.random.default_rng(seed))
    assert min(result.image.size) in (90, 120) or max(result.image.size) == 260
    if len(result.boxes):
        assert np.abs(result.boxes[0] - bounds_of_white(result.image)).max() <= 3
    else:
        assert np.asarray(result.image).max() < 255


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (50, 40), (384, 384), (2000, 1500)])
@pytest.mark.parametrize("crop_probability", [0.0, 1.0])
def test_detr_augmentation_takes_any_size(size, crop_probability):
    config = TransformConfig(crop=crop_probability)
    whole = Scene(Image.new("RGB", size), np.array([[0.0, 0.0, *size]]), np.zeros(1, dtype=np.int64))
    for seed in range(3):
        result = train_transforms(config)(whole, np.random.default_rng(seed))
        assert max(result.image.size) <= 1333 and min(result.image.size) <= 800
        assert result.boxes.tolist() == [[0, 0, *result.image.size]]


def test_the_generator_alone_decides_what_is_drawn():
    def outcome(seed):
        result = train_transforms(DETR)(scene(), np.random.default_rng(seed))
        return result.image.size, result.image.tobytes(), result.boxes.tolist()

    torch.manual_seed(0)
    np.random.seed(0)
    first = outcome(5)
    assert outcome(5) == first
    assert len({outcome(seed)[0] for seed in range(6)}) > 1


def test_evaluation_resizes_only_and_draws_nothing():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    result = eval_transforms(DETR)(scene(), rng)
    assert result.image.size == (1333, 666)
    assert len(result.boxes) == 2
    assert rng.bit_generator.state == before


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_single_scale_leaves_images_of_that_scale_alone_but_for_mirroring(flip, mirrored):
    transform = train_transforms(TransformConfig.single_scale(100, flip))
    original = scene(width=160, boxes=[(20, 10, 80, 60)])
    results = [transform(original, np.random.default_rng(seed)) for seed in range(16)]
    assert {result.image.size for result in results} == {(160, 100)}
    assert {result.boxes[0, 0] == 80 for result in results} == mirrored


def test_normalised_subtracts_imagenets_mean_and_divides_by_its_deviation():
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 102, 0]]], dtype=np.uint8))
    tensor = normalised(image)
    assert tensor.shape == (3, 1, 2) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    expected = (torch.tensor([[[0, 1.0]], [[0.2, 0.4]], [[1.0, 0]]]) - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / (
        torch.tensor(IMAGENET_STD).view(3, 1, 1)
    )
    torch.testing.assert_close(tensor, expected)


def test_normalised_boxes_are_centres_and_extents_as_fractions():
    boxes = normalised_boxes(np.array([[20.0, 10.0, 80.0, 60.0]]), 200, 100)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.tensor([[0.25, 0.35, 0.3, 0.5]]))
    assert normalised_boxes(np.zeros((0, 4)), 200, 100).shape == (0, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", -0.1),
        ("flip", 1.5),
        ("crop", float("nan")),
        ("scales", ()),
        ("scales", (480, 0)),
        ("crop_scales", ()),
        ("max_size", 0),
        ("eval_scale", -1),
        ("crop_size", (600, 384)),
        ("crop_size", (384,)),
    ],
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        TransformConfig(**{field: value})


def target(image_id, height, width, count=2):
    return Target(image_id, torch.rand(count, 4), torch.zeros(count, dtype=torch.int64), (height, width), (9, 9))


def test_collate_pads_right_and_bottom_with_zeros_and_marks_the_padding():
    images = [torch.ones(3, 4, 6), torch.ones(3, 5, 2)]
    batch = collate([(images[0], target(1, 4, 6)), (images[1], target(2, 5, 2, count=0))])
    assert isinstance(batch, Batch) and len(batch) == 2
    assert batch.images.shape == (2, 3, 5, 6) and batch.padding_mask.shape == (2, 5, 6)
    for row, image in enumerate(images):
        height, width = image.shape[1:]
        assert not batch.padding_mask[row, :height, :width].any()
        assert batch.padding_mask[row].sum() == 5 * 6 - height * width
    assert torch.equal(batch.images, (~batch.padding_mask)[:, None].expand(-1, 3, -1, -1).float())
    assert [t.image_id for t in batch.targets] == [1, 2]


def test_collate_of_equal_sizes_has_no_padding_and_of_nothing_is_an_error():
    batch = collate([(torch.rand(3, 4, 4), target(1, 4, 4))] * 3)
    assert batch.images.shape == (3, 3, 4, 4) and batch.padding_mask is None
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_a_batch_moves_with_its_targets():
    moved = collate([(torch.rand(3, 4, 4), target(1, 4, 4)), (torch.rand(3, 5, 4), target(2, 5, 4))]).to("meta")
    tensors = [moved.images, moved.padding_mask, moved.targets[0].boxes, moved.targets[0].labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.targets[0].size == (4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_a_batch_pins_all_its_tensors():
    pinned = collate([(torch.rand(3, 4, 4), target(1, 4, 4)), (torch.rand(3, 5, 4), target(2, 5, 4))]).pin_memory()
    assert all(
        t.is_pinned() for t in (pinned.images, pinned.padding_mask, pinned.targets[0].boxes, pinned.targets[0].labels)
    )
