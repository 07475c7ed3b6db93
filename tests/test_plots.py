import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from route_detr.config import preset
from route_detr.predict import draw_detections
from route_detr.run import Run
from route_detr.tools import plots
from route_detr.tools.plots import (
    competing_groups,
    matched,
    pairwise_iou,
    plot_curves,
    plot_detections,
    plot_routing,
    plot_schedule,
)

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


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_names_are_drawn_as_they_are_and_inside_their_image(drawn, tmp_path):
    names = ["$1-$5 bill", "Ba$$in", r"\\frac{1}{2}$", "a long name at the right edge of its image"]
    boxes = torch.tensor([[0.0, 20, 30, 60], [40, 20, 60, 60], [60, 60, 70, 90], [90, 40, 99, 60]])
    found = {"boxes": boxes, "labels": torch.arange(4), "scores": torch.full((4,), 0.5)}
    image = Image.new("RGB", (100, 100))
    plots.plot_detections([image], [found], [found], names, tmp_path / "detections.png")
    drawn[0].draw_without_rendering()
    upper, lower = drawn[0].axes
    assert [text.get_text() for text in upper.texts] == names
    assert [text.get_text() for text in lower.texts] == [f"{name} 0.50" for name in names]
    for axes in (upper, lower):
        assert all(text.get_window_extent().x1 <= axes.get_window_extent().x1 + 0.5 for text in axes.texts)
    drawn[0].savefig(tmp_path / "detections.png")


def test_a_name_in_a_script_that_the_font_has_not_is_no_warning(tmp_path):
    found = {"boxes": torch.tensor([[2.0, 2, 9, 9]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}
    images = [Image.new("RGB", (32, 24))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = Run(tmp_path).draw(
            "detections.png",
            lambda path: plots.plot_detections(images, [found], [found], ["写真 \N{AUTOMOBILE}"], path),
        )
    assert drawn == ["detections.png"] and Image.open(tmp_path / "detections.png").format == "PNG"


def test_curves_of_a_run_with_masks_show_them_below_a_title_that_fits(drawn, tmp_path):
    scores = {f"{kind}{name}": 0.25 for kind in ("", "mask_") for name in ("AP", "AP50", "AP75")}
    records = [{"kind": "epoch", "epoch": n, "step": 10 * n, "loss": 1.0, **scores} for n in range(2)]
    plots.plot_curves(records, tmp_path / "curves.png")
    drawn[0].draw_without_rendering()
    precision = drawn[0].axes[1]
    assert {line.get_label() for line in precision.lines} == {f"{n.replace('_', ' ')} 0.250" for n in scores}
    for axes in drawn[0].axes:
        assert axes._left_title.get_window_extent().x1 <= drawn[0].bbox.x1


def test_each_row_of_a_routing_map_has_the_number_of_its_group_in_the_image(drawn, tmp_path):
    view = {"bias": torch.zeros(4, 4), "gate": torch.ones(4, 4), "boxes": BOXES}
    view["confidence"] = torch.tensor([0.5, 0.9, 0.8, 0.1])  # groups [1, 0], [3] and [2]
    plots.plot_routing(Image.new("RGB", (50, 20)), {0: view}, tmp_path / "routing.png")
    picture, bias, _, gate = drawn[0].subfigs[0].axes[:4]
    assert sorted(text.get_text() for text in picture.texts) == ["1", "2", "3"]
    for axes in (bias, gate):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
        assert axes.get_yticks().tolist() == [0.5, 2, 3]


def test_a_label_of_a_predicted_box_stays_inside_the_picture():
    found = {
        "boxes": torch.tensor([[500.0, 100, 511, 140]]),
        "labels": torch.tensor([0]),
        "scores": torch.tensor([0.9]),
    }
    image = Image.new("RGB", (512, 512), "white")
    pixels = [np.asarray(draw_detections(image, found, [name])) for name in ("a name", "a name$")]
    inside = [(each[:100] != 255).any(-1) for each in pixels]
    assert all(0 < rows.any(0).argmax() < 500 for rows in inside) and inside[0].sum() < inside[1].sum()


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
