"""Transforms keep boxes on their objects and draw from the given generator only; batches are padded."""

import numpy as np
import pytest
import torch
from coco_samples import single_scale
from PIL import Image

from route_detr.data.batches import Batch, Target, collate, shuffled
from route_detr.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TransformConfig,
    View,
    eval_view,
    image_pixels,
    normalised,
    normalised_boxes,
    resized_shape,
    train_view,
)

DETR = TransformConfig()


def scene(width=200, height=100, boxes=((20, 10, 80, 60), (150, 50, 200, 100))):
    """A black image with a white rectangle in place of each box; the boxes; and a mask [H, W, T] of each."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    masks = np.zeros((height, width, len(boxes)), dtype=np.uint8)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        pixels[y0:y1, x0:x1] = 255
        masks[y0:y1, x0:x1, index] = 1
    return Image.fromarray(pixels), np.array(boxes, dtype=np.float64).reshape(-1, 4), masks


def bounds_of_white(image) -> np.ndarray:
    array = np.asarray(image)
    rows, columns = np.nonzero(array > 0 if array.ndim == 2 else array[:, :, 0] > 127)
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


def test_a_view_of_all_at_another_size_scales_boxes_and_one_of_the_same_size_is_the_image_itself():
    image, boxes, masks = scene()
    same = View((0, 0, 200, 100), (200, 100))
    assert same.image(image) is image
    assert same.boxes(boxes).tolist() == boxes.tolist()
    assert np.array_equal(same.masks(masks), masks.transpose(2, 0, 1))
    other = View((0, 0, 200, 100), (400, 150))
    assert other.image(image).size == (400, 150)
    assert other.boxes(boxes).tolist() == [[40, 15, 160, 90], [300, 75, 400, 150]]


def test_a_mirrored_view_moves_boxes_and_masks_with_their_pixels():
    image, boxes, masks = scene(boxes=[(20, 10, 80, 60)])
    view = View((0, 0, 200, 100), (200, 100), mirrored=True)
    assert view.boxes(boxes).tolist() == [[120, 10, 180, 60]]
    assert bounds_of_white(view.image(image)).tolist() == [120, 10, 180, 60]
    assert bounds_of_white(view.masks(masks)[0]).tolist() == [120, 10, 180, 60]


def test_a_window_cuts_boxes_and_leaves_none_of_what_is_outside():
    image, boxes, masks = scene()
    view = View((50, 0, 150, 50), (100, 50))
    assert view.image(image).size == (100, 50)
    assert view.boxes(boxes)[0].tolist() == [0, 10, 30, 50]
    x0, y0, x1, y1 = view.boxes(boxes)[1]
    assert x0 == x1 or y0 == y1
    assert view.masks(masks).sum((1, 2)).tolist() == [30 * 40, 0]


@pytest.mark.parametrize("seed", range(12))
def test_detr_augmentation_keeps_box_and_mask_on_their_object(seed):
    small = TransformConfig(scales=(90, 120), max_size=260, crop=0.7, crop_scales=(80, 150), crop_size=(60, 110))
    image, boxes, masks = scene(boxes=[(60, 20, 140, 80)])
    view = train_view(image.size, small, np.random.default_rng(seed))
    seen, (box,), (mask,) = view.image(image), view.boxes(boxes), view.masks(masks)
    assert min(seen.size) in (90, 120) or max(seen.size) == 260
    assert mask.shape == seen.size[::-1]
    if (box[2:] > box[:2]).all():
        assert np.abs(box - bounds_of_white(seen)).max() <= 1
        assert np.abs(box - bounds_of_white(mask)).max() <= 1
        assert (mask.astype(bool) != (np.asarray(seen)[:, :, 0] > 127)).mean() < 0.02
    else:
        assert np.asarray(seen).max() < 255 and not mask.any()


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (50, 40), (384, 384), (2000, 1500)])
@pytest.mark.parametrize("crop_probability", [0.0, 1.0])
def test_detr_augmentation_takes_any_size(size, crop_probability):
    config = TransformConfig(crop=crop_probability)
    image, masks = Image.new("RGB", size), np.ones((*size[::-1], 1), dtype=np.uint8)
    for seed in range(3):
        view = train_view(size, config, np.random.default_rng(seed))
        assert max(view.size) <= 1333 and min(view.size) <= 800
        assert view.image(image).size == view.size
        np.testing.assert_allclose(view.boxes(np.array([[0.0, 0.0, *size]])), [[0, 0, *view.size]])
        assert view.masks(masks).all() and view.masks(masks).shape == (1, *view.size[::-1])


def test_the_generator_alone_decides_what_is_drawn():
    torch.manual_seed(0)
    np.random.seed(0)
    views = [train_view((200, 100), DETR, np.random.default_rng(seed)) for seed in range(6)]
    assert train_view((200, 100), DETR, np.random.default_rng(5)) == views[5]
    assert len(set(views)) > 3


def test_evaluation_sees_the_whole_image():
    assert eval_view((200, 100), DETR) == View((0, 0, 200, 100), (1333, 666))


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_single_scale_leaves_images_of_that_scale_alone_but_for_mirroring(flip, mirrored):
    config = single_scale(100, flip)
    views = {train_view((160, 100), config, np.random.default_rng(seed)) for seed in range(16)}
    assert views == {View((0, 0, 160, 100), (160, 100), each) for each in mirrored}


def test_normalised_subtracts_imagenets_mean_and_divides_by_its_deviation():
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 102, 0]]], dtype=np.uint8))
    pixels = image_pixels(image)
    assert pixels.shape == (3, 1, 2) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    tensor = normalised(pixels)
    assert tensor.dtype == torch.float32
    expected = (torch.tensor([[[0, 1.0]], [[0.2, 0.4]], [[1.0, 0]]]) - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / (
        torch.tensor(IMAGENET_STD).view(3, 1, 1)
    )
    torch.testing.assert_close(tensor, expected)


def test_normalised_boxes_are_centres_and_extents_as_fractions():
    boxes = normalised_boxes(np.array([[20.0, 10.0, 80.0, 60.0]]), (200, 100))
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.tensor([[0.25, 0.35, 0.3, 0.5]]))
    assert normalised_boxes(np.zeros((0, 4)), (200, 100)).shape == (0, 4)


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


def sample(image_id, height, width, count=2, masks=False):
    masks = torch.rand(count, height, width) > 0.5 if masks else None
    target = Target(
        image_id, torch.rand(count, 4), torch.zeros(count, dtype=torch.int64), (height, width), (9, 9), masks
    )
    return torch.randint(1, 256, (3, height, width), dtype=torch.uint8), target


def test_collate_pads_right_and_bottom_and_the_padding_is_zero_after_normalising():
    samples = [sample(1, 4, 6), sample(2, 5, 2, count=0)]
    batch = collate(samples)
    assert isinstance(batch, Batch) and len(batch) == 2
    assert batch.images.shape == (2, 3, 5, 6) and batch.padding_mask.shape == (2, 5, 6)
    for row, (pixels, _) in enumerate(samples):
        height, width = pixels.shape[1:]
        assert not batch.padding_mask[row, :height, :width].any()
        assert batch.padding_mask[row].sum() == 5 * 6 - height * width
        assert torch.equal(batch.images[row, :, :height, :width], normalised(pixels))
    assert not batch.images.masked_select(batch.padding_mask[:, None]).any()
    assert [t.image_id for t in batch.targets] == [1, 2]


def test_collate_of_equal_sizes_has_no_padding_and_of_nothing_is_an_error():
    batch = collate([sample(1, 4, 4)] * 3)
    assert batch.images.shape == (3, 3, 4, 4) and batch.padding_mask is None
    assert torch.equal(batch.images[1], normalised(batch.pixels[1]))
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_a_batch_moves_what_is_large_and_keeps_boxes_and_labels_on_the_host():
    batch = collate([sample(1, 4, 4, masks=True), sample(2, 4, 6)]).to("meta")
    first, second = batch.targets
    moved = [batch.pixels, batch.images, batch.padding_mask, first.masks]
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert {tensor.device.type for tensor in (first.boxes, first.labels)} == {"cpu"}
    assert first.size == (4, 4) and second.masks is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_a_batch_pins_what_it_moves():
    pinned = collate([sample(1, 4, 4, masks=True), sample(2, 4, 6)]).pin_memory()
    assert all(t.is_pinned() for t in (pinned.pixels, pinned.padding_mask, pinned.targets[0].masks))


def test_shuffled_batches_are_of_one_orientation_as_far_as_their_numbers_allow():
    landscape = np.arange(23) % 3 > 0
    order = shuffled(landscape, 4, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(23)) and order != sorted(order)
    batches = [order[start : start + 4] for start in range(0, 23, 4)]
    assert [len({landscape[i] for i in batch}) for batch in batches[:-1]] == [1, 1, 1, 1, 1]
    assert order == shuffled(landscape, 4, torch.Generator().manual_seed(0))
    assert order != shuffled(landscape, 4, torch.Generator().manual_seed(1))


def test_images_of_one_orientation_are_shuffled_plainly():
    plain = torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    assert shuffled([True] * 23, 4, torch.Generator().manual_seed(0)) == plain
