"""Masks: cost and losses against plain formulas on whole masks, the points chosen, and what a detector gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_samples import annotation, content, opened, with_two_images
from pycocotools import mask as rle
from small_detector import small_batch, small_detector
from torch.nn import functional

from route_detr.config import TrainConfig
from route_detr.evaluation import detections, full_masks, image_mask_logits
from route_detr.model.criterion import Criterion
from route_detr.model.masks import (
    mask_cost,
    mask_losses,
    mask_targets,
    sampled,
    uncertain_points,
)
from route_detr.model.structures import MaskTargets


def grid(height, width):
    """The centres of all pixels, as points: at these, sampling a map of that size gives the map."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def truth(count, height=12, width=8):
    return torch.randint(2, (count, height, width)).bool()


def whole(masks, pixels):
    return mask_targets([SimpleNamespace(masks=each) for each in masks], pixels)


def dice_and_cross_entropy(logits, target):
    """Losses of one mask: 1 - (2 sum p t + 1) / (sum p + sum t + 1), and the mean cross-entropy."""
    p, t = logits.sigmoid().flatten(), target.flatten().to(logits.dtype)
    cross_entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    return cross_entropy.item(), (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)).item()


def test_sampling_at_pixel_centres_gives_the_map_and_between_them_the_mean():
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    points = grid(4, 6).expand(2, -1, -1)
    torch.testing.assert_close(sampled(maps, points), maps.flatten(2))
    between = torch.tensor([[[1 / 6, 1 / 8]]], dtype=torch.float64).expand(2, 1, 2)
    torch.testing.assert_close(sampled(maps, between)[..., 0], maps[:, :, 0, :2].mean(-1))


def test_targets_are_looked_up_at_the_pixel_that_a_point_is_in():
    masks = truth(3)
    targets = MaskTargets([masks], torch.ones(1, 2))
    assert torch.equal(targets.at(0, grid(12, 8)), masks.flatten(1).double())
    one_each = targets.at(0, grid(12, 8).expand(2, -1, -1), torch.tensor([2, 0]))
    assert torch.equal(one_each, masks[[2, 0]].flatten(1).double())
    assert torch.equal(targets.at(0, torch.ones(1, 2)), masks[:, -1:, -1].float())


@pytest.fixture
def on_all_pixels(monkeypatch):
    """Random points become the centres of all pixels of a map at a quarter of the size: results are known."""
    points = grid(3, 2)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: points.expand(*shape[:-2], -1, -1).clone())
    return len(points)


def test_cost_is_the_formula_for_every_pair(on_all_pixels):
    torch.manual_seed(0)
    embeddings = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    pixels = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    masks = [truth(3), truth(1)]
    targets = whole(masks, pixels)
    costs = [mask_cost(embeddings[image], pixels, targets, image, on_all_pixels) for image in range(2)]
    assert [tuple(each.shape) for image in costs for each in image] == [(3, 2, 4)] * 2 + [(1, 2, 4)] * 2
    for image, branch, query in np.ndindex(2, 2, 4):
        logits = torch.einsum("c,chw->hw", embeddings[image, branch, query], pixels[image])
        for target, mask in enumerate(masks[image]):
            expected = dice_and_cross_entropy(logits, mask[2::4, 2::4])
            found = [cost[target, branch, query].item() for cost in costs[image]]
            assert found == pytest.approx(expected, rel=1e-9)


def test_losses_are_the_formula_summed_over_pairs(monkeypatch):
    torch.manual_seed(0)
    embeddings = torch.randn(2, 2, 4, 5, dtype=torch.float64).requires_grad_()
    pixels = torch.randn(2, 5, 3, 2, dtype=torch.float64).requires_grad_()
    masks = [truth(3), truth(0)]
    pairs = [(torch.tensor([[0, 3], [2, 1]]), torch.tensor([[1, 2], [0, 2]])), (torch.zeros(2, 0).long(),) * 2]
    all_pixels = lambda maps, extent, count: grid(3, 2).expand(len(maps), -1, -1)  # noqa: E731
    monkeypatch.setattr("route_detr.model.masks.uncertain_points", all_pixels)
    losses = mask_losses(embeddings, pixels, whole(masks, pixels), pairs, 6)
    for branch in range(2):
        expected = np.zeros(2)
        for query, target in zip(pairs[0][0][branch], pairs[0][1][branch], strict=True):
            logits = torch.einsum("c,chw->hw", embeddings[0, branch, query], pixels[0])
            expected += dice_and_cross_entropy(logits, masks[0][target, 2::4, 2::4])
        assert losses[branch].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    losses.sum().backward()
    assert embeddings.grad[0].abs().sum() > 0 and pixels.grad[0].abs().sum() > 0 and not pixels.grad[1].any()


def test_points_are_mostly_where_the_mask_is_undecided():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 64, dtype=torch.float64)
    maps = 20 * x.expand(3, 1, 64, 64)  # decided but at the middle column
    points = uncertain_points(maps, torch.ones(2, dtype=torch.float64), 200)
    assert points.shape == (3, 200, 2) and (points >= 0).all() and (points < 1).all()
    near = (points[..., 0] - 0.5).abs() < 0.15
    assert 0.75 < near.float().mean() < 0.9


def test_padding_is_neither_sampled_nor_predicted():
    pixels = torch.full((1, 1, 4, 6), -5.0, dtype=torch.float64)
    pixels[..., :2, :3] = 5.0  # the image is 8 x 12 of the 16 x 24 pixels
    target = SimpleNamespace(masks=torch.ones(1, 8, 12, dtype=torch.bool))
    targets = mask_targets([target], pixels)
    assert targets.extents.tolist() == [[0.5, 0.5]]
    embeddings = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    cross_entropy, _ = mask_cost(embeddings[0], pixels, targets, 0, 500)
    inside = functional.softplus(torch.tensor(-5.0)).item()
    assert cross_entropy.item() < 3  # at the image's border logits are interpolated towards the padding
    logits = image_mask_logits(embeddings[0, 0], pixels[0], (8, 12))
    assert logits.shape == (1, 2, 3) and functional.softplus(-logits).max().item() == pytest.approx(inside)
    assert full_masks(logits, (80, 120)).all() and full_masks(logits, (80, 120)).shape == (1, 80, 120)


def with_masks(targets, sizes=((50, 45), (70, 33))):
    for target, size in zip(targets, sizes, strict=True):
        target.masks = torch.rand(len(target.labels), *size) > 0.5
    return targets


def test_a_detector_with_masks_gives_them_and_learns_from_them():
    images, padding_mask, targets = small_batch()
    detector = small_detector(masks=True).train()
    detector.set_routing(0.3, 0.7)
    output = detector(images, padding_mask)
    assert output.pixel_embeddings.shape == (2, 16, 18, 12)
    assert [layer.mask_embeddings.shape for layer in output.layers] == [(2, 1, 7, 16), (2, 2, 7, 16), (2, 2, 7, 16)]
    losses = Criterion(TrainConfig(mask_points=100))(output, with_masks(targets))
    kinds = {name.split("/")[1] for name in losses if "/" in name and name.startswith("layer")}
    assert kinds == {"class", "l1", "giou", "mask", "dice"}
    assert losses["loss"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k != "loss"))
    losses["loss"].backward()
    for module in (detector.pixel_embedding, detector.decoder.mask_head):
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    found = detections(output, [(100, 90), (140, 66)], top_k=5, input_sizes=[(50, 45), (70, 33)])
    assert [each["masks"].shape for each in found] == [(5, 100, 90), (5, 140, 66)]
    assert found[0]["masks"].dtype == torch.bool
    assert detections(output, [(72, 48)] * 2, top_k=2)[1]["masks"].shape == (2, 72, 48)


def test_a_query_that_is_detected_as_two_classes_has_one_mask():
    detector = small_detector(masks=True).eval()
    images = small_batch(padded=False)[0]
    found = detections(detector(images), [(70, 45)] * 2, top_k=21)[0]
    boxes, masks = found["boxes"], found["masks"]
    same = (boxes[:, None] == boxes[None]).all(-1)
    assert same.sum() == 7 * 3 * 3
    assert all(torch.equal(masks[i], masks[j]) for i, j in same.nonzero())


def test_targets_without_masks_are_a_clear_error():
    images, padding_mask, targets = small_batch()
    output = small_detector(masks=True)(images, padding_mask)
    with pytest.raises(ValueError, match=r"targets\[0\]\.masks: expected bool \[T, h, w\]"):
        Criterion(TrainConfig())(output, targets)


@pytest.fixture
def folder(tmp_path):
    return with_two_images(tmp_path)


TRIANGLE = [[10, 10, 30, 10, 10, 20]]
BLOCK = rle.encode(np.asfortranarray(np.pad(np.ones((5, 4), np.uint8), ((10, 25), (20, 36)))))
BLOCK_LENGTHS = [20 * 40 + 10, 5, 35, 5, 35, 5, 35, 5, 25 + 36 * 40]


@pytest.mark.parametrize(
    ("segmentation", "area"),
    [
        (TRIANGLE, 100),
        ([*TRIANGLE, [30, 20, 30, 10, 10, 20]], 200),
        ({"size": [40, 60], "counts": BLOCK["counts"].decode()}, 20),
        ({"size": [40, 60], "counts": BLOCK_LENGTHS}, 20),
    ],
)
def test_polygons_and_run_lengths_become_masks(folder, segmentation, area):
    objects = [annotation(1, segmentation=segmentation), annotation(2, image=2, segmentation=TRIANGLE)]
    dataset = opened(folder, content(annotations=objects), masks=True)
    target = dataset[0][1]
    assert target.masks.shape == (1, 40, 60) and target.masks.dtype == torch.bool
    assert abs(int(target.masks.sum()) - area) <= 0.1 * area
    y, x = target.masks[0].nonzero().T
    assert x.min() >= 9 and y.min() >= 9 and x.max() <= 30 and y.max() <= 20
    assert dataset.masks(1).shape == (40, 60, 1)


def test_an_image_without_objects_has_no_masks_and_a_set_opened_without_has_none_at_all(folder):
    masked = opened(folder, content(annotations=[annotation(1, segmentation=TRIANGLE)]), masks=True)
    assert masked[1][1].masks.shape == (0, 40, 60)
    assert opened(folder)[0][1].masks is None
    with pytest.raises(ValueError, match="masks=True"):
        opened(folder).masks(0)
