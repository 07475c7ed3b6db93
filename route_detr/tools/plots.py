"""The pictures of a run: curves.png, detections.png, routing.png, schedule.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from route_detr.compare.statistics import CONFIDENCE
from route_detr.config import Config
from route_detr.files import save_figure
from route_detr.model.schedule import routing_values
from route_detr.model.structures import RoutingValues

# Okabe and Ito's colours, which every kind of colour vision tells apart.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
ARM_COLOURS = (GREY, BLUE, RED, GREEN, ORANGE, PURPLE)


def style(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def plot_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Loss, average precision, learning rate and routing schedule of a run from the lines of its metrics.jsonl."""
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    scored = [record for record in records if "AP" in record]
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, precision, rate, schedule = figure.subplots(2, 2).flat

    def draw(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=label, **style)

    draw(loss, steps, "loss", "step", color=BLUE, lw=0.7, alpha=0.5)
    draw(loss, epochs, "loss", "mean of the epoch", color=BLUE, lw=2, marker="o", ms=3)
    style(loss, "Training loss (main + weighted auxiliary branch)", "step")
    best = max((record for record in epochs if "AP" in record), key=lambda record: record["AP"], default=None)
    for kind, line in (("", "-"), ("mask_", "--")):
        for name, color in ((f"{kind}AP50", ORANGE), (f"{kind}AP", BLUE), (f"{kind}AP75", GREEN)):
            if best is not None and name in best:
                label = f"{name.replace('_', ' ')} {best[name]:.3f}"
                draw(precision, scored, name, label, color=color, marker="o", ms=3.5, ls=line)
    top = "" if best is None else f"; in the legend epoch {best['epoch'] + 1}, the best"
    style(precision, f"Validation, main branch{top}", "step")
    draw(rate, steps, "learning_rate", "", color=PURPLE, lw=2, marker=".", ms=4)
    style(rate, "Learning rate", "step")
    draw(schedule, steps, "routing_strength", "routing strength λ", color=RED, lw=2)
    draw(schedule, steps, "aux_weight", "auxiliary weight α", color=GREY, lw=2, ls="--")
    style(schedule, "Routing schedule", "step")
    for axes in (precision, schedule):
        axes.set_ylim(bottom=0)
    save_figure(figure, path)


def sampled_schedule(config: Config, steps_per_epoch: int, samples: int = 400) -> list[tuple[float, RoutingValues]]:
    """(epoch, values) at about so many of a run's steps, evenly spread, for a plot."""
    total = config.train.total_steps(steps_per_epoch)
    steps = sorted({round(index * total / samples) for index in range(samples + 1)})
    return [(step / steps_per_epoch, routing_values(config, step, steps_per_epoch)) for step in steps]


def plot_schedule(config: Config, steps_per_epoch: int, path: str | Path) -> None:
    """lambda(t) of each routed layer, alpha(t) and the route type over the epochs of a run."""
    when, values = zip(*sampled_schedule(config, steps_per_epoch), strict=True)
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    layers = config.detector.routed_layer_indices
    for number, layer in enumerate(layers):
        shade = 0.5 + 0.5 * (number + 1) / len(layers)
        strengths = [value.strengths[number] for value in values]
        axes.plot(when, strengths, color=RED, lw=2, alpha=shade, label=f"routing strength λ, decoder layer {layer}")
    axes.plot(when, [value.aux_weight for value in values], color=GREY, lw=2, ls="--", label="auxiliary weight α")
    for kind, color in (("suppressor", ORANGE), ("delegator", PURPLE)):
        stage = [value.route_type == kind for value in values]
        if any(stage):
            axes.fill_between(when, 0, 1, stage, transform=axes.get_xaxis_transform(), color=color, alpha=0.15)
            axes.plot([], [], color=color, lw=6, alpha=0.3, label=f"{kind} alone")
    dropped = config.train.drop_at * config.train.total_steps(steps_per_epoch) / steps_per_epoch
    axes.axvline(dropped, color=GREEN, lw=1, ls=":", label="learning rate × 0.1")
    axes.set_ylim(bottom=0)
    style(axes, "Dual-branch schedule: L = L_main + α(t) L_aux, bias λ(t) B", "epoch")
    save_figure(figure, path)


def _show_image(axes: Axes, image: Image.Image, title: str) -> None:
    axes.imshow(image, extent=(0, image.width, image.height, 0))  # pixel i covers i to i + 1, as boxes count
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def _draw_box(axes: Axes, box: Sequence[float], text: str, color: str, dashed: bool = False, lw: float = 1.6) -> None:
    """``box`` is (x0, y0, x1, y1) in pixels of the image shown."""
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=lw, ls="--" if dashed else "-"))
    if text:
        label = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        va = "top" if y0 < 0.05 * max(axes.get_ylim()) else "bottom"
        axes.text(
            x0, y0, text, fontsize=6.5, color="white", va=va, bbox=label, clip_on=True, parse_math=False, zorder=3
        )


def _move_labels_inside(figure: Figure) -> None:
    """Shifts to the left each text that sticks out of its axes at the right."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in axes.texts:
            beyond = text.get_window_extent().x1 - axes.get_window_extent().x1
            if beyond > 0:
                x, y = axes.transData.transform(text.get_position())
                text.set_x(axes.transData.inverted().transform((x - beyond, y))[0])


def _draw_mask(axes: Axes, mask: Tensor, color: str) -> None:
    """mask: [H, W] bool of the image shown."""
    tint = np.zeros((*mask.shape, 4))
    tint[mask.numpy()] = to_rgba(color, 0.4)
    axes.imshow(tint, extent=(0, mask.shape[1], mask.shape[0], 0), interpolation="nearest")


def plot_detections(
    images: Sequence[Image.Image],
    truths: Sequence[Mapping[str, Tensor]],
    founds: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    path: str | Path,
) -> None:
    """Images with the truth above and the detections below.

    Truths and detections are boxes [K, 4] float xyxy in pixels, labels [K] and, for detections, scores [K]; masks
    [K, H, W] bool where there are some. A detection is right when its box overlaps that of a still free truth of its
    class by IoU 0.5.
    """
    figure = Figure(figsize=(3.4 * len(images), 7.4), layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False)
    for (upper, lower), image, truth, found in zip(grid.T, images, truths, founds, strict=True):
        right, hit = matched(truth, found)
        scores = [f" {score:.2f}" for score in found["scores"].tolist()]
        for axes, boxes, good, notes, title in (
            (upper, truth, hit, [""] * len(hit), f"truth: {sum(hit)} of {len(hit)} found"),
            (lower, found, right, scores, f"detected: {sum(right)} of {len(right)} right"),
        ):
            _show_image(axes, image, title)
            for mask, is_good in zip(boxes.get("masks", ()), good, strict=False):
                _draw_mask(axes, mask, BLUE if is_good else RED)
            for box, label, is_good, note in zip(boxes["boxes"].tolist(), boxes["labels"], good, notes, strict=True):
                _draw_box(axes, box, names[int(label)] + note, BLUE if is_good else RED, dashed=not is_good)
    figure.suptitle("Truth (top) and detections: blue = matched at IoU 0.5, red dashed = missed or wrong", fontsize=11)
    _move_labels_inside(figure)
    save_figure(figure, path)


def matched(truth: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[list[bool], list[bool]]:
    """Which detections are right, which truths are found: greedily, the most certain detection first."""
    right, hit = [False] * len(found["boxes"]), [False] * len(truth["boxes"])
    same = found["labels"][:, None] == truth["labels"]
    overlap = pairwise_iou(found["boxes"], truth["boxes"]) * same
    for number in found["scores"].argsort(descending=True).tolist():
        free = [(float(overlap[number, other]), other) for other, taken in enumerate(hit) if not taken]
        best, other = max(free, default=(0.0, -1))
        if best >= 0.5:
            right[number] = hit[other] = True
    return right, hit


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes given by corners, [K, 4] and [M, 4] -> [K, M]; 0 / 0 counts as 0."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(-1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp_min(1e-12)


def competing_groups(boxes: Tensor, confidence: Tensor, overlap: float = 0.5) -> list[list[int]]:
    """Queries that compete for one object: greedy groups by IoU with the most confident, from left to right.

    boxes [N, 4] xyxy, confidence [N]. Each query is in one group; the leader comes first in it.
    """
    iou = pairwise_iou(boxes, boxes)
    order = confidence.argsort(descending=True).tolist()
    groups: list[list[int]] = []
    while order:
        members = [order[0]] + [query for query in order[1:] if iou[order[0], query] >= overlap]
        groups.append(members)
        order = [query for query in order if query not in members]
    return sorted(groups, key=lambda members: float(boxes[members[0], 0] + boxes[members[0], 2]))


def plot_routing(
    image: Image.Image, layers: Mapping[int, Mapping[str, Tensor]], path: str | Path, top: int = 40
) -> None:
    """The learned bias and gate of one image as heat maps, for each routed layer.

    Each layer has ``bias`` and ``gate`` [N, N] (at strength 1; the gate is p_sup), ``boxes`` [N, 4] xyxy in pixels
    of the image and ``confidence`` [N]. The ``top`` most confident queries are shown, the competing ones adjacent; rows
    and columns of a map carry the number that their group has in the image.
    """
    figure = Figure(figsize=(12.5, 0.6 + 10 * len(layers)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(layers), 1))
    for part, (layer, view) in zip(parts, sorted(layers.items()), strict=True):
        _plot_layer(part, f"decoder layer {layer}", image, view, top)
    figure.suptitle("What routing learned: which queries keep away from each other (orange) or team up (purple)")
    _move_labels_inside(figure)
    save_figure(figure, path)


def _plot_layer(figure: SubFigure, name: str, image: Image.Image, view: Mapping[str, Tensor], top: int) -> None:
    chosen = view["confidence"].argsort(descending=True)[:top].sort().values
    boxes, confidence = view["boxes"][chosen], view["confidence"][chosen]
    bias, gate = (view[key][chosen][:, chosen].float() for key in ("bias", "gate"))
    groups = competing_groups(boxes, confidence)
    order = torch.tensor([query for members in groups for query in members])
    picture, bias_map, by_overlap, gate_map = figure.subplots(2, 2).flat

    _show_image(picture, image, f"{name}: {len(order)} queries; groups numbered from the left, red: they compete")
    for number, members in enumerate(groups, start=1):
        for query in members[1:]:
            _draw_box(picture, boxes[query].tolist(), "", ORANGE, lw=0.6)
        _draw_box(
            picture,
            boxes[members[0]].tolist(),
            str(number),
            *((RED, False, 1.6) if len(members) > 1 else (GREY, False, 0.8)),
        )

    reach = max(float(bias.abs().quantile(0.995)), 1e-6)
    sizes = np.array([len(members) for members in groups])
    starts = np.cumsum(sizes) - sizes - 0.5
    for axes, values, title, colours, low, high, ink in (
        (bias_map, bias, "bias B (before λ)", "PuOr", -reach, reach, "black"),
        (gate_map, gate, "gate: share of the suppressor route", "cividis", 0.0, 1.0, "white"),
    ):
        drawn = axes.imshow(values[order][:, order].numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(drawn, ax=axes, shrink=0.8)
        for start, side in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            axes.add_patch(Rectangle((start, start), side, side, fill=False, ec=ink, lw=1.2))
        centres, numbers = starts + sizes / 2, range(1, len(groups) + 1)
        axes.set_xticks(centres, numbers, fontsize=6, rotation=90)
        axes.set_yticks(centres, numbers, fontsize=6)
        axes.set(xlabel="group of the key query", ylabel="group of the attending query")
        axes.set_title(f"{title}, competing groups outlined", fontsize=10)
    _plot_by_overlap(by_overlap, pairwise_iou(boxes, boxes), bias)


def _plot_by_overlap(axes: Axes, iou: Tensor, bias: Tensor) -> None:
    """Bias of every pair of different queries against their overlap, with the mean of each bin."""
    pairs = ~torch.eye(len(bias), dtype=torch.bool)
    overlap, values = iou[pairs].numpy(), bias[pairs].numpy()
    axes.scatter(overlap, values, s=5, color=GREY, alpha=0.25, linewidths=0, rasterized=True)
    bins = np.digitize(overlap, [1e-9, 0.2, 0.4, 0.6, 0.8])
    means = [(overlap[bins == each].mean(), values[bins == each].mean()) for each in np.unique(bins)]
    axes.plot(*zip(*means, strict=True) if means else ([], []), color=BLUE, marker="o", lw=2, label="mean of the pairs")
    axes.axhline(0, color="black", lw=0.8)
    style(axes, "Does it act on competitors?", "overlap of the two queries' boxes (IoU)", "bias B")


def plot_comparison(found: Mapping[str, Any], path: str | Path) -> None:
    """Learning curves against steps and seconds, each with the range of its seeds, and the paired differences."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    by_steps, by_seconds, differences = figure.subplots(1, 3)
    colours = dict(zip(found["arms"], (ARM_COLOURS * len(found["arms"]))[: len(found["arms"])], strict=True))
    for axes, axis, label in ((by_steps, "step", "step"), (by_seconds, "train_seconds", "seconds of training steps")):
        for name in found["arms"]:
            runs = [run for run in found["runs"] if run["arm"] == name]
            ends = np.linspace(0, min(run[axis] for run in runs), 101)
            lines = [
                np.interp(ends, *([0, *(p[k] for p in run["curve"])] for k in (axis, "AP")))
                for run in runs
            ]  # fmt: skip
            axes.plot(ends, np.mean(lines, 0), color=colours[name], lw=2, label=name)
            axes.fill_between(ends, np.min(lines, 0), np.max(lines, 0), color=colours[name], alpha=0.2, lw=0)
        axes.set_ylim(bottom=0)
        style(axes, f"AP; mean and range of {len(found['seeds'])} seeds", label)
    rows = [(name, place) for name in found["differences"] for place in found["differences"][name]]
    for height, (name, place) in enumerate(reversed(rows)):
        ap = found["differences"][name][place]["AP"]
        if ap["low"] is not None:
            differences.plot([ap["low"], ap["high"]], [height] * 2, color=colours[name], lw=3, alpha=0.5)
        by_seed = found["differences"][name][place]["AP_by_seed"]
        differences.plot(by_seed, [height] * len(by_seed), "|", color=colours[name], ms=9)
        differences.plot(ap["difference"], height, "o", color=colours[name])
    differences.axvline(0, color="black", lw=0.8)
    differences.set_yticks(range(len(rows)), [f"{name}\n{place}" for name, place in reversed(rows)], fontsize=9)
    differences.set_ylim(-0.7, len(rows) - 0.3)
    style(
        differences,
        f"AP less that of {next(iter(found['arms']))}, {CONFIDENCE:.0%} intervals",
        "difference; a mark a seed",
    )
    save_figure(figure, path)
