"""`route-detr memory`: the peak of a detector's training step, planned on fake tensors."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .planner import Plan, Request

MIB, GIB = 2**20, 2**30
CARDS = {  # the total memory that `nvidia-smi` shows, in MiB
    **{"t4-16g": 15360, "v100-16g": 16384, "l4-24g": 23034, "a10-24g": 23028, "rtx3090-24g": 24576},
    **{"rtx4090-24g": 24564, "rtx5090-32g": 32607, "v100-32g": 32768, "a100-40g": 40960, "l40s-48g": 46068},
    **{"a6000-48g": 49140, "a100-80g": 81920, "h100-80g": 81559, "h200-141g": 143771, "b200-180g": 183359},
}
CONTEXT = 1024 * MIB
"""Bytes of CUDA's context, loaded kernels and cuBLAS's workspaces: an allowance, not a measurement."""
FRAGMENTATION = 0.05
"""Share of the rest that PyTorch's caching allocator may hold without using it: an allowance likewise."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
AGREEMENT = 0.05  # of a measured peak with the planned one
DESCRIPTION = (
    "Plans the peak memory of a training step of the detector: the real step on fake tensors, so it takes seconds, "
    "needs no GPU and gives the same bytes every time. Kernels' workspaces are counted; fragmentation and CUDA's "
    "context are not: --fit leaves room for them."
)


def add_parser(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add `memory` to the commands of route-detr; common: options that all of them have."""
    parser = commands.add_parser(
        *("memory",),
        parents=[common],
        help="plan the peak memory of a training step without a GPU",
        description=DESCRIPTION,
    )
    parser.set_defaults(action=plan_memory)
    parser.add_argument("--preset", default="dino-r50", help="of route-detr [%(default)s]")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field, as detector.num_queries=300")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images [%(default)s]")
    parser.add_argument(
        "--image", type=image_size, default=(800, 1333), metavar="HxW", help="of the padded batch [800x1333]"
    )
    parser.add_argument("--boxes", type=int, default=20, metavar="N", help="of each image [%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of autocast; fp32: none [%(default)s]")
    parser.add_argument(
        "--memory", metavar="LEVEL", help="none, fused, lean, tight, min, or all of them in one table [the preset's]"
    )
    parser.add_argument("--public", action="store_true", help="the public formulation instead; with `all`: as well")
    parser.add_argument(
        "--scope", choices=("step", "transformer"), default="step",
        help="transformer: without backbone and optimizer, on the neck's outputs [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--products", action="store_true", help="FLOPs of matrix products and convolutions as well")
    parser.add_argument(
        "--fit",
        choices=CARDS,
        metavar="CARD",
        help=f"largest batch of so many --boxes, for {', '.join(CARDS)}",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="the rows as stacked bars and over queries and image sizes; "
        "without --memory and --public: all levels, and the public formulation",
    )  # fmt: skip
    parser.add_argument("--measure", action="store_true", help="run the step on this GPU and compare")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def image_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH as two numbers."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, as 800x1333, got {text!r}")
    return int(height), int(width)


def usable(card: str) -> int:
    """Bytes of a card for the tensors of a step: its total less `CONTEXT`, less the share `FRAGMENTATION` of that."""
    return int((CARDS[card] * MIB - CONTEXT) * (1 - FRAGMENTATION))


def plan_memory(options: argparse.Namespace) -> int:
    """Exit code: 0; 1 for a measured peak more than 5 % off the planned one."""
    from tqdm import tqdm

    from route_detr.files import check_replaceable, with_folder

    from . import planner, plot

    if options.plot:
        check_replaceable("picture", options.plot)
    request = _request(options)
    requests = _rows(options, request)
    progress = tqdm(desc="steps planned", unit="step", leave=False, disable=None)
    planned: dict[str, Plan] = {}

    def plan(row: Request) -> Plan:
        """Once for each request: tables, fits and lines of a plot share some."""
        if repr(row) not in planned:
            planned[repr(row)] = planner.plan(row)
            progress.update()
        return planned[repr(row)]

    rows = {name: plan(row) for name, row in requests.items()}
    result: dict[str, Any] = {
        "request": {**vars(request), "config": request.config.to_dict(), "dtype": request.dtype_name},
        "rows": {name: dataclasses.asdict(row) for name, row in rows.items()},
    }
    del result["request"]["public"]
    lines = [_title(request), "", *table(rows)]
    if options.products:
        result["products"] = {name: planner.products(row) for name, row in requests.items()}
        lines += ["", *(f"{n}: {flops / 1e12:.2f} TFLOP of products" for n, flops in result["products"].items())]
    if options.fit:
        limit = usable(options.fit)
        batches = {
            name: planner.largest_batch(row, limit, lambda each: plan(each).peak) for name, row in requests.items()
        }
        result["fit"] = {"card": options.fit, "usable": limit, "largest_batch": batches}
        total = _gib(CARDS[options.fit] * MIB)
        lines += ["", f"{options.fit}: {total}, of which a step may plan with {_gib(limit)}"]
        lines += [f"{name}: largest batch {batch}" for name, batch in batches.items()]
    agrees = True
    if options.measure:
        result["measured"] = measured = {name: planner.measured_peak(row) for name, row in requests.items()}
        agrees = all(abs(size / rows[name].peak - 1) <= AGREEMENT for name, size in measured.items())
        lines += ["", *(f"{n}: measured {_gib(m)}, planned {_gib(rows[n].peak)}" for n, m in measured.items())]
    if options.plot:
        plot.draw(requests, with_folder(options.plot), plan)
        lines += ["", f"drawn to {options.plot}"]
    progress.close()
    print(json.dumps(result, indent=1) if options.json else "\n".join(lines))
    return 0 if agrees else 1


def _request(options: argparse.Namespace) -> Request:
    import torch
    import yaml

    from route_detr.config import preset

    from .planner import Request

    changes = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in options.overrides)}
    if options.memory not in (None, "all"):
        changes["detector.memory"] = options.memory
    config, dtype = preset(options.preset).updated(changes), getattr(torch, DTYPES[options.dtype])
    return Request(config, options.batch, options.image, dtype, options.scope, options.public, options.boxes)


def _rows(options: argparse.Namespace, request: Request) -> dict[str, Request]:
    """The steps to plan, by the names of their rows."""
    from .planner import LEVELS

    every = options.plot and not options.memory and not options.public  # a picture compares
    wanted = options.public or (every and not request.config.detector.masks)
    public = {"public": dataclasses.replace(request, public=True)} if wanted else {}
    ours = dataclasses.replace(request, public=False)
    if every or options.memory == "all":
        return public | {level: ours.at(level) for level in LEVELS}
    return public or {request.config.detector.memory: ours}


def _title(request: Request) -> str:
    detector = request.config.detector
    queries = f"{detector.num_queries} queries"
    if detector.denoising_pairs:
        queries += f" + {detector.denoising_pairs} denoising pairs"
    return f"planned peak of a training {request}, {queries}"


def table(rows: dict[str, Plan]) -> list[str]:
    """Rows by name as lines of text: the peak and its parts in GiB, or in MiB where no peak is a GiB."""
    parts = [part for part in next(iter(rows.values())).parts if any(plan.parts[part] for plan in rows.values())]
    name_of_unit, unit = ("GiB", GIB) if any(plan.peak >= GIB for plan in rows.values()) else ("MiB", MIB)
    head = [name_of_unit, "peak", *parts]
    cells = [[name, *(f"{size / unit:.2f}" for size in (p.peak, *map(p.parts.get, parts)))] for name, p in rows.items()]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *cells]
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
