import pytest
import torch
from PIL import Image

from route_detr.config import preset
from route_detr.plots import (
    competing_groups,
    matched,
    pairwise_iou,
    plot_curves,
    plot_detections,
    plot_routing,
    plot_schedule,
)
from route_detr.prediction import draw_detections

BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [30.0, 0.0, 40.0, 10.0], [5.0, 0.0, 15.0, 10.0]])


def test_pairwise_iou():
    assert pairwise_iou(BOXES[:1], BOXES)[0].tolist() == pytest.approx([1, 0.8, 0, 1 / 3])
    assert pairwise_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
    assert pairwise_iou(torch.zeros(0, 4), BOXES).shape == (0, 4)


def test_competing_queries_are_grouped_under_the_most_confident_from_left_to_right():
    confidence = torch.tensor([0.5, 0.9, 0.8, 0.1])
    assert competing_groups(BOXES, confidence) == [[1, 0], [3], [2]]


def test_a_truth_is_found_once_by_the_most_certain_detection_of_its_class():
    truth = {"boxes": BOXES[[0, 2]], "labels": torch.tensor([1, 1])}
    found = {"boxes": BOXES[[1, 0, 2]], "labels": torch.tensor([1, 1, 0]), "scores": torch.tensor([0.3, 0.9, 0.8])}
    assert matched(truth, found) == ([False, True, False], [True, False])


def test_pictures_of_next_to_nothing(tmp_path):
    plot_curves([], tmp_path / "curves.png")
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    image = Image.new("RGB", (20, 10))
    plot_detections([image], [nothing], [nothing], ["a"], tmp_path / "detections.png")
    view = {"bias": torch.zeros(1, 1), "gate": torch.ones(1, 1), "boxes": BOXES[:1], "confidence": torch.ones(1)}
    plot_routing(image, {0: view, 1: view}, tmp_path / "routing.png")
    for name in ("curves", "detections", "routing"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 300


def test_masks_tint_the_image(tmp_path):
    mask = torch.zeros(1, 512, 512, dtype=torch.bool)
    mask[:, 100:200, 100:300] = True
    found = {"boxes": BOXES[:1], "labels": torch.tensor([0]), "scores": torch.tensor([0.9]), "masks": mask}
    image = Image.new("RGB", (512, 512), "white")
    picture = draw_detections(image, found, ["a"])
    tinted, plain = picture.getpixel((200, 150)), picture.getpixel((400, 400))
    assert plain == (255, 255, 255) and max(tinted[:2]) < 255
    for name, founds in (("with", found), ("without", {**found, "masks": torch.zeros_like(mask)})):
        plot_detections([image], [founds], [founds], ["a"], tmp_path / f"{name}.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"detector.route": False},
        {"schedule.unit": "step", "schedule.ramp": 900, "schedule.shape": "linear"},
        {"schedule.suppressor_until": 1, "schedule.delegator_until": 2},
        {"detector.routed_layers": "all", "schedule.layer_strengths": [0.1, 0.5, 1.0]},
    ],
    ids=["paper's", "plain", "by step", "by stage", "by layer"],
)
def test_a_schedule_is_drawn(tmp_path, changes):
    plot_schedule(preset("tiny").updated(changes), 625, tmp_path / "schedule.png")
    with Image.open(tmp_path / "schedule.png") as picture:
        assert picture.format == "PNG"
