"""Images a second that training data come at: DETR's augmentation of COCO-like photographs, no model.

    python -m benchmarks loader [--workers 0 2] [--images 64]

A step of training waits for its data where this is less than the images a second that the GPUs take. Half of the
photographs are upright, so that batches in plain random order need padding that batches by orientation do not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from route_detr.data.batches import batch_loader, epoch_batches
from route_detr.data.coco import CocoDetection, write_instances
from route_detr.data.transforms import TransformConfig

from .device import RESULTS, circumstances
from .report import aligned, origin
from .timing import spread, time_in_turns

OBJECTS, BATCH = 7, 8  # an image of COCO has about 7
SIZES = ((640, 480), (480, 640))
CONTENDERS = {
    "boxes": {},
    "boxes, decoded images cached": {"cached": True},
    "boxes, batches in plain random order": {"grouped": False},
    "boxes and masks": {"masks": True},
    "boxes and masks, decoded images cached": {"masks": True, "cached": True},
}


def write_photographs(folder: Path, count: int) -> None:
    """JPEGs of smooth noise, whose size on disk is a photograph's, with polygons of 12 points."""
    rng = np.random.default_rng(0)
    (folder / "train2017").mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        width, height = SIZES[number % 2]
        blurred = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
        photograph = blurred.resize((width, height), Image.Resampling.BICUBIC)
        photograph.save(folder / "train2017" / f"{number}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        for _ in range(OBJECTS):
            (x, y), (w, h) = rng.uniform(0, 0.6, 2) * (width, height), rng.uniform(0.1, 0.4, 2) * (width, height)
            angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
            outline = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotation |= {"bbox": [x, y, w, h], "area": w * h, "segmentation": [outline.ravel().tolist()]}
            annotations.append(annotation)
    write_instances(folder, "train", images, annotations, [{"id": 1, "name": "blob"}], description="Noise")


class Epochs:
    """One contender: each call loads one more epoch."""

    def __init__(self, folder: Path, workers: int, masks: bool = False, cached: bool = False, grouped: bool = True):
        file = folder / "annotations" / "instances_train2017.json"
        cache = folder / "decoded" if cached else None
        self.dataset = CocoDetection(
            file, folder / "train2017", TransformConfig(), train=True, masks=masks, cache=cache
        )
        self.landscape = self.dataset.landscape if grouped else np.ones(len(self.dataset), dtype=bool)
        self.workers, self.epoch = workers, 0
        self.pixels, self.padded = 0, 0

    def __call__(self) -> None:
        self.dataset.set_epoch(self.epoch)
        for batch in batch_loader(self.dataset, epoch_batches(self.landscape, BATCH, 0, self.epoch), self.workers):
            self.pixels += batch.pixels[:, 0].numel()
            self.padded += 0 if batch.padding_mask is None else int(batch.padding_mask.sum())
        self.epoch += 1


def measured(folder: Path, images: int, workers: int, seconds: float) -> dict[str, Any]:
    """Images a second and the share of padding of each contender, which take turns."""
    epochs = {name: Epochs(folder, workers, **choice) for name, choice in CONTENDERS.items()}
    result: dict[str, Any] = {"workers": workers, "contenders": {}}
    for name, times in time_in_turns(epochs, seconds).items():
        rates = spread([images / each for each in times])
        result["contenders"][name] = {
            "images_per_second": {key: round(value, 1) for key, value in rates.items()},
            "rounds": len(times),
            "padding": round(epochs[name].padded / epochs[name].pixels, 3),
        }
    return result


def table(result: dict[str, Any]) -> str:
    """One number of workers for a terminal."""
    rows = []
    for name, each in result["contenders"].items():
        rate = each["images_per_second"]
        between = f"({rate['min']:.1f} to {rate['max']:.1f})"
        rows.append([name, f"{rate['median']:.1f}", between, f"{each['padding']:.1%}"])
    return aligned([f"loader, {result['workers']} workers", "images/s", "", "padding"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and writes loader.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks loader", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, os.cpu_count() or 1], help="numbers (default: 0 and all CPUs)"
    )
    parser.add_argument("--images", type=int, default=64, help="an epoch (default: 64)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring for each number (default: 20)")
    parser.add_argument("--out", type=Path, help="folder for loader.json (default: benchmarks/results/DEVICE)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # of the collating process, as of each worker
    results = {**circumstances(), "batch": BATCH, "images": args.images, "settings": []}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.images)
        for workers in args.workers:
            print(f"measuring the loader with {workers} workers", file=sys.stderr, flush=True)
            results["settings"].append(measured(Path(folder), args.images, workers, args.seconds))
            print(f"\n{table(results['settings'][-1])}")
    print(f"\n{origin(results)}")
    folder = args.out or RESULTS / results["device"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loader.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0
