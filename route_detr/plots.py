"""The pictures of a run: curves.png, detections.png, routing.png, schedule.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from route_detr.checkpoint import write_atomically
from route_detr.config import Config
from route_detr.schedule import sampled_schedule

# Okabe and Ito's colours, which every kind of colour vision tells apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#777777"


def save_figure(figure: Figure, path: str | Path) -> None:
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=130))


def _style(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Loss, average precision, learning rate and routing schedule of a run from the lines of its metrics.jsonl."""
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, precision, rate, schedule = figure.subplots(2, 2).flat
    when = [record["step"] for record in steps]
    loss.plot(when, [record["loss"] for record in steps], color=SKY, lw=0.8, alpha=0.8, label="step")
    ends = [record["step"] for record in epochs]
    loss.plot(
        ends, [record["loss"] for record in epochs], color=BLUE, lw=2, marker="o", ms=3, label="mean of the epoch"
    )
    _style(loss, "Training loss (main + weighted auxiliary branch)", "step")

    scored = [record for record in epochs if "AP" in record]
    done = [record["epoch"] + 1 for record in scored]
    for name, color, marker in (("AP50", ORANGE, "s"), ("AP", BLUE, "o"), ("AP75", GREEN, "^")):
        precision.plot(done, [record[name] for record in scored], color=color, marker=marker, ms=3.5, label=name)
    if scored:
        top = max(scored, key=lambda record: record["AP"])
        precision.axhline(top["AP"], color=BLUE, ls=":", lw=1)
        precision.set_ylim(0, max(0.1, 1.1 * max(record["AP50"] for record in scored)))
        best = f"Validation, main branch: best AP {top['AP']:.3f}, AP50 {top['AP50']:.3f} (epoch {top['epoch'] + 1})"
    _style(precision, best if scored else "Validation, main branch", "epoch")
    precision.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    precision.set_xlim(0, 1.03 * max(done, default=1))

    rate.plot(when, [record["learning_rate"] for record in steps], color=PURPLE, lw=2, marker=".", ms=4)
    rate.set_yscale("log")
    _style(rate, "Learning rate", "step")
    schedule.plot(when, [record["routing_strength"] for record in steps], color=RED, lw=2, label="routing strength λ")
    schedule.plot(
        when, [record["aux_weight"] for record in steps], color=GREY, lw=2, ls="--", label="auxiliary weight α"
    )
    _style(schedule, "Routing schedule", "step")
    schedule.set_ylim(bottom=0)
    for axes in (loss, rate, schedule):
        axes.set_xlim(0, 1.03 * max(when + ends, default=1))
    for axes in (loss, precision, schedule):
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_schedule(config: Config, path: str | Path) -> None:
    """lambda(t) and alpha(t) over the epochs of a run."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    when, values = zip(*sampled_schedule(config, steps_per_epoch=1000), strict=True)
    for index, layer in enumerate(config.detector.routed_layer_indices):
        strengths = [each.strengths[index] for each in values]
        axes.plot(when, strengths, color=RED, lw=2, alpha=0.5, label=f"routing strength λ(t), layer {layer}")
    alphas = [each.aux_weight for each in values]
    axes.plot(when, alphas, color=GREY, lw=2, ls="--", label="auxiliary weight α(t)")
    axes.axvline(config.train.drop_at * config.train.epochs, color=PURPLE, lw=1, ls=":", label="learning rate × 0.1")
    _style(axes, "Dual-branch schedule: L = L_main + α(t) L_aux, bias λ(t) B", "epoch")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(figure, path)


def _show_image(axes: Axes, image: Image.Image) -> None:
    axes.imshow(image, extent=(0, image.width, image.height, 0))  # pixel i covers i to i + 1, as boxes count
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_box(axes: Axes, box: Sequence[float], text: str, color: str, dashed: bool = False) -> None:
    """``box`` is (x0, y0, x1, y1) in pixels of the image shown."""
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=1.6, ls="--" if dashed else "-"))
    if text:
        label = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        inside = y0 < 0.05 * max(axes.get_ylim())
        va = "top" if inside else "bottom"
        axes.text(x0, y0, text, fontsize=6.5, color="white", va=va, ha="left", bbox=label, clip_on=True)


def plot_detections(examples: Sequence[Mapping[str, Any]], names: Sequence[str], path: str | Path) -> None:
    """Images with the truth above and the detections below.

    Each example has ``image`` (PIL), ``truth`` and ``found``: dicts of boxes [K, 4] float xyxy in pixels, labels [K]
    and, for ``found``, scores [K]. A detection is right when it overlaps a still free truth of its class by IoU 0.5.
    """
    columns = len(examples)
    figure = Figure(figsize=(max(3.1 * columns, 6.5), 6.9), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for column, example in enumerate(examples):
        truth, found = example["truth"], example["found"]
        right, hit = matched(truth, found)
        upper, lower = grid[:, column]
        _show_image(upper, example["image"])
        for box, label, was_found in zip(truth["boxes"].tolist(), truth["labels"].tolist(), hit, strict=True):
            _draw_box(upper, box, names[label], BLUE if was_found else RED, dashed=not was_found)
        upper.set_title(f"truth: {sum(hit)} of {len(hit)} found", fontsize=9)
        _show_image(lower, example["image"])
        for number, box in enumerate(found["boxes"].tolist()):
            score = f"{found['scores'][number]:.2f}".lstrip("0")
            text = f"{names[int(found['labels'][number])]} {score}"
            _draw_box(lower, box, text, BLUE if right[number] else RED, dashed=not right[number])
        lower.set_title(f"detected: {sum(right)} of {len(right)} right", fontsize=9)
    figure.suptitle(
        "Truth (top) and detections (bottom): blue = matched at IoU 0.5, red dashed = missed or wrong", fontsize=11
    )
    save_figure(figure, path)


def matched(truth: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[list[bool], list[bool]]:
    """Which detections are right, which truths are found: greedily, the most certain detection first."""
    right, hit = [False] * len(found["boxes"]), [False] * len(truth["boxes"])
    overlap = pairwise_iou(found["boxes"], truth["boxes"])
    for number in found["scores"].argsort(descending=True).tolist():
        same = truth["labels"] == found["labels"][number]
        candidates = [
            (float(overlap[number, other]), other) for other in range(len(hit)) if same[other] and not hit[other]
        ]
        best, other = max(candidates, default=(0.0, -1))
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
        leader = order[0]
        members = [leader] + [query for query in order[1:] if iou[leader, query] >= overlap]
        groups.append(members)
        order = [query for query in order if query not in members]
    return sorted(groups, key=lambda members: float(boxes[members[0], 0] + boxes[members[0], 2]))


def plot_routing(
    image: Image.Image, layers: Mapping[int, Mapping[str, Tensor]], path: str | Path, top: int = 60
) -> None:
    """The learned bias and gate of one image as heat maps, for each routed layer.

    Each layer has ``bias`` and ``gate`` [N, N] (at strength 1; the gate is p_sup), ``boxes`` [N, 4] xyxy in pixels
    of the image and ``confidence`` [N]. The ``top`` most confident queries are shown, the competing ones adjacent.
    """
    figure = Figure(figsize=(12.5, 0.6 + 10 * len(layers)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(layers), 1))
    for part, (layer, view) in zip(parts, sorted(layers.items()), strict=True):
        _plot_layer(part, f"decoder layer {layer}", image, view, top)
    figure.suptitle("What routing learned: which queries keep away from each other (orange) or team up (purple)")
    save_figure(figure, path)


def _plot_layer(figure: SubFigure, name: str, image: Image.Image, view: Mapping[str, Tensor], top: int) -> None:
    chosen = view["confidence"].argsort(descending=True)[:top].sort().values
    boxes, confidence = view["boxes"][chosen], view["confidence"][chosen]
    bias, gate = (view[key][chosen][:, chosen].float() for key in ("bias", "gate"))
    groups = competing_groups(boxes, confidence)
    order = torch.tensor([query for members in groups for query in members])
    picture, bias_map, by_overlap, gate_map = figure.subplots(2, 2).flat

    _show_image(picture, image)
    for number, members in enumerate(groups, start=1):
        contested = len(members) > 1
        for query in members[1:]:
            x0, y0, x1, y1 = boxes[query].tolist()
            picture.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=ORANGE, lw=0.6, alpha=0.7))
        _draw_box(picture, boxes[members[0]].tolist(), str(number), RED if contested else GREY)
    picture.set_title(f"{name}: {len(order)} queries in {len(groups)} groups, numbered from the left", fontsize=10)

    reach = max(float(bias.abs().quantile(0.995)), 1e-6)
    shown = (
        (bias_map, bias, "bias B (before λ)", "PuOr", -reach, reach, "black"),
        (gate_map, gate, "gate: share of the suppressor route", "cividis", 0.0, 1.0, "white"),
    )
    starts = np.cumsum([0] + [len(members) for members in groups])
    for axes, values, title, colours, low, high, ink in shown:
        drawn = axes.imshow(values[order][:, order].numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(drawn, ax=axes, shrink=0.8)
        for number, (start, members) in enumerate(zip(starts, groups, strict=False), start=1):
            if len(members) > 1:
                side = len(members)
                axes.add_patch(Rectangle((start - 0.5, start - 0.5), side, side, fill=False, ec=ink, lw=1.2))
                axes.text(start + side, start + side / 2 - 0.5, str(number), fontsize=7, va="center", color=ink)
        axes.set_title(f"{title}, groups outlined", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("key query")
        axes.set_ylabel("attending query")
    _plot_by_overlap(by_overlap, pairwise_iou(boxes, boxes), bias)


def _plot_by_overlap(axes: Axes, iou: Tensor, bias: Tensor) -> None:
    """Bias of every pair of different queries against their overlap, with the mean of each bin."""
    pairs = ~torch.eye(len(bias), dtype=torch.bool)
    overlap, values = iou[pairs].numpy(), bias[pairs].numpy()
    axes.scatter(overlap, values, s=5, color=GREY, alpha=0.25, linewidths=0, rasterized=True)
    edges = np.array([0.0, 1e-9, 0.2, 0.4, 0.6, 0.8, 1.0 + 1e-6])
    which = np.digitize(overlap, edges) - 1
    filled = [number for number in range(len(edges) - 1) if (which == number).any()]
    centres = [overlap[which == number].mean() for number in filled]
    means = [values[which == number].mean() for number in filled]
    axes.plot(centres, means, color=BLUE, marker="o", lw=2, label="mean of the pairs")
    axes.axhline(0, color="black", lw=0.8)
    _style(axes, "Does it act on competitors?", "overlap of the two queries' boxes (IoU)", "bias B")
    axes.legend(frameon=False)
