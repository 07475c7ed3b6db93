"""Planned memory in a picture: levels as stacked bars, and peaks over the number of queries and the image size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .planner import LEVELS, PARTS, Plan, Request
from .plots import save_figure

GIB = 2**30
LINES = ("fused", "lean", "tight", "min")
QUERIES = (300, 600, 900, 1200, 1500)
SHORT_SIDES = (480, 640, 800, 960)


def draw(request: Request, path: str | Path, plan: Callable[[Request], Plan]) -> None:
    """Writes a PNG: all levels, and the public formulation of a detector without masks."""
    ours = dataclasses.replace(request, public=False)
    wanted = {} if ours.config.detector.masks else {"public": dataclasses.replace(request, public=True)}
    wanted |= {level: ours.at(level) for level in LEVELS if level != "none"}
    bars = {name: plan(row) for name, row in wanted.items()}
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    levels, queries, sizes = figure.subplots(1, 3)
    _stack(levels, bars)
    for axes, values, changed, name in (
        (queries, QUERIES, _with_queries, "queries"),
        (sizes, SHORT_SIDES, _with_short_side, "short side of the image"),
    ):
        for level in LINES:
            peaks = [plan(changed(ours, value).at(level)).peak / GIB for value in values]
            axes.plot(values, peaks, marker="o", ms=3.5, label=level)
        axes.set_ylim(0)
        axes.legend(fontsize=8)
        _style(axes, f"over {name}", name)
    height, width = request.image
    dtype = str(request.dtype).removeprefix("torch.")
    figure.suptitle(f"Planned peak of a training {request.scope}, batch {request.batch}, {height} x {width}, {dtype}")
    save_figure(figure, path)


def _stack(axes: Axes, plans: Mapping[str, Plan]) -> None:
    bottom = dict.fromkeys(plans, 0.0)
    colors = colormaps["tab20"].colors
    for part, color in zip(PARTS, colors, strict=False):
        heights = [plans[name].parts[part] / GIB for name in plans]
        if any(heights):
            axes.bar(list(plans), heights, bottom=list(bottom.values()), label=part, color=color)
        bottom = {name: base + height for (name, base), height in zip(bottom.items(), heights, strict=True)}
    for name, top in bottom.items():
        axes.annotate(f"{top:.1f}", (name, top), ha="center", va="bottom", fontsize=9)
    axes.legend(fontsize=7)
    _style(axes, "by memory level", "")


def _with_queries(request: Request, queries: int) -> Request:
    return dataclasses.replace(request, config=request.config.updated({"detector.num_queries": queries}))


def _with_short_side(request: Request, side: int) -> Request:
    ratio = side / min(request.image)
    return dataclasses.replace(request, image=tuple(round(length * ratio) for length in request.image))


def _style(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel("GiB")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
