"""Planned memory in a picture: levels as stacked bars, and peaks over the number of queries and the image size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from route_detr.files import save_figure

from .planner import PARTS, Plan, Request

GIB = 2**30
QUERIES = (300, 600, 900, 1200, 1500)
SHORT_SIDES = (480, 640, 800, 960)


def draw(requests: Mapping[str, Request], path: str | Path, plan: Callable[[Request], Plan]) -> None:
    """Writes a PNG: the rows that are asked for, and each of them over queries and image sizes."""
    request = next(iter(requests.values()))
    figure = Figure(figsize=(14.5, 4.6), layout="constrained")
    levels, queries, sizes = figure.subplots(1, 3)
    _stack(levels, {name: plan(row) for name, row in requests.items()})
    for axes, values, changed, name in (
        (queries, QUERIES, _with_queries, "queries"),
        (sizes, SHORT_SIDES, _with_short_side, "short side of the image"),
    ):
        for row, each in requests.items():
            axes.plot(
                values, [plan(changed(each, value)).peak / GIB for value in values], marker="o", ms=3.5, label=row
            )
        axes.set_ylim(0)
        _style(axes, f"over {name}", name)
    sizes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"Planned peak of a training {request}")
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
    axes.set_ylim(0, 1.08 * max(bottom.values()))
    axes.legend(fontsize=7, reverse=True, loc="upper left", bbox_to_anchor=(1, 1))
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
