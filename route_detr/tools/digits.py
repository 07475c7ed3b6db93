"""Crowded digits: real handwriting, scaled and pasted over one another, as an ordinary COCO folder.

scikit-learn bundles 1,797 scans of handwritten digits, 8 x 8 pixels each (E. Alpaydin and C. Kaynak, "Optical
recognition of handwritten digits", UCI 1998). A seeded generator scales 5 to 25 of them to 16 to 44 pixels and pastes
them with heavy overlap onto a textured canvas. No scan is used in both splits.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from route_detr.data.coco import whole_folder, write_instances
from route_detr.data.report import DatasetError

GENERATOR_VERSION = 1
PARAMETERS_FILE = "digits.json"
VALIDATION_SHARE = 0.2
INK_THRESHOLD = 0.5
MIN_VISIBLE_FRACTION = 0.25
PLACEMENT_ATTEMPTS = 20
SCENE_ATTEMPTS = 20
FRAME_SCALE = 10 / 8  # a scan gets a border of one cell, so that its strokes can end smoothly
CLUSTERED_SHARE = 0.25
MIN_CONTRAST = 70.0
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
SPLITS = ("train", "val")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DigitsParameters:
    """All that determines a data set of crowded digits; written to ``digits.json`` in its folder."""

    seed: NonNegativeInt = 0
    train_images: NonNegativeInt = 5000
    val_images: NonNegativeInt = 100
    image_size: PositiveInt = 128
    digits_per_image: tuple[PositiveInt, PositiveInt] = (5, 25)
    digit_size: tuple[PositiveInt, PositiveInt] = (16, 44)
    generator_version: int = GENERATOR_VERSION

    @model_validator(mode="after")
    def _fits_together(self) -> DigitsParameters:
        for name, smallest in (("digits_per_image", 1), ("digit_size", 8)):
            low, high = getattr(self, name)
            if not smallest <= low <= high:
                raise ValueError(f"{name}: expected (low, high) with {smallest} <= low <= high, got {(low, high)}")
        if self.image_size < FRAME_SCALE * self.digit_size[1]:
            least = f"{FRAME_SCALE} times digit_size = {self.digit_size[1]}"
            raise ValueError(f"image_size: expected at least {least}, got {self.image_size}")
        return self

    def as_json(self) -> dict:
        return TypeAdapter(DigitsParameters).dump_python(self, mode="json")


def side_for(most: int) -> int:
    """Side of a square canvas on which each of the most digits has as much room as each of 25 has on 128 x 128."""
    return max(128, 16 * round(128 * (most / 25) ** 0.5 / 16))


class DigitScene(NamedTuple):
    """One generated image and its digits, lowest first (later ones lie on top)."""

    image: np.ndarray  # [S, S, 3] uint8
    owner: np.ndarray  # [S, S] int16: the digit whose ink is seen at a pixel, -1 where it is the canvas
    boxes: np.ndarray  # [T, 4] int64 (x, y, w, h): tight around the whole digit's ink, hidden parts included
    ink: np.ndarray  # [T] int64: how many pixels the whole digit's ink has, hidden ones included
    digits: np.ndarray  # [T] int64, 0 to 9

    @property
    def masks(self) -> np.ndarray:
        """[T, S, S] bool: each digit's visible ink."""
        return self.owner == np.arange(len(self.digits), dtype=self.owner.dtype)[:, None, None]


def digit_scans(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scans ([K, 8, 8] float32 in 0..1) and digits ([K] int64) of "train" and "val": disjoint, by class."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    scans, digits = bundled.images.astype(np.float32) / 16.0, bundled.target.astype(np.int64)
    rng = np.random.default_rng((seed, len(SPLITS)))
    train, val = [], []
    for digit in range(10):
        shuffled = rng.permutation(np.flatnonzero(digits == digit))
        held_out = round(VALIDATION_SHARE * len(shuffled))
        val.append(shuffled[:held_out])
        train.append(shuffled[held_out:])
    return {
        split: (scans[rows], digits[rows])
        for split, rows in zip(SPLITS, map(np.concatenate, (train, val)), strict=True)
    }


def paint_canvas(size: int, rng: np.random.Generator) -> np.ndarray:
    """[size, size, 3] float32 in 0..255: a colour with clouds and grain, at times a gradient or stripes."""
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = rng.uniform(40, 215) + rng.uniform(-25, 25, 3).astype(np.float32)
    for cells, strength in ((int(rng.integers(2, 5)), 22.0), (int(rng.integers(8, 20)), 12.0)):
        clouds = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        texture = np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC))
        canvas += texture[:, :, None] * rng.uniform(0.2, 1.0, 3).astype(np.float32) * strength
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    across = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    pattern = rng.integers(3)
    if pattern == 1:
        canvas += (across * rng.uniform(15, 50))[:, :, None].astype(np.float32)
    elif pattern == 2:
        stripes = np.sin(across * np.float32(rng.uniform(15, 70))) * np.float32(rng.uniform(5, 14))
        canvas += stripes[:, :, None]
    canvas += rng.integers(-4, 5, (size, size, 1)).astype(np.float32)
    return canvas


def ink_of(scan: np.ndarray, size: int, aspect: float) -> np.ndarray:
    """Coverage [h, w] float32 in 0..1 by the ink of a scan, cut to the ink.

    Its 8 x 8 cells become ``size`` pixels wide and high; ``aspect`` narrows (below 1) or flattens (above 1) it.
    """
    scaled = size * FRAME_SCALE
    shape = (round(scaled * min(aspect, 1.0)), round(scaled / max(aspect, 1.0)))
    smooth = np.asarray(Image.fromarray(np.pad(scan, 1)).resize(shape, Image.Resampling.BICUBIC))
    coverage = np.clip((smooth - 0.25) / 0.4, 0.0, 1.0)
    inked = coverage > INK_THRESHOLD
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def ink_colour(paper: float, rng: np.random.Generator) -> np.ndarray:
    """[3] float32: a random colour whose brightness differs from the paper's by ``MIN_CONTRAST`` or more."""
    darker, lighter = paper - MIN_CONTRAST, 255.0 - (paper + MIN_CONTRAST)
    if rng.uniform() * (max(darker, 0) + max(lighter, 0)) < max(darker, 0):
        brightness = rng.uniform(0, darker)
    else:
        brightness = rng.uniform(paper + MIN_CONTRAST, 255.0)
    colour = rng.uniform(0, 255, 3).astype(np.float32)
    return np.clip(colour + np.float32(brightness) - colour @ LUMA, 0, 255)


def _corner(shape: tuple[int, int], size: int, boxes: list, rng: np.random.Generator) -> tuple[int, int]:
    """Top left corner (x, y) for a digit: anywhere, or (``CLUSTERED_SHARE``) close to one already placed."""
    height, width = shape
    if boxes and rng.uniform() < CLUSTERED_SHARE:
        x, y, w, h = boxes[rng.integers(len(boxes))]
        shift_x, shift_y = rng.uniform(-0.7, 0.7, 2)
        corner = (round(x + w / 2 - width / 2 + shift_x * w), round(y + h / 2 - height / 2 + shift_y * h))
    else:
        corner = (int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1)))
    return min(max(corner[0], 0), size - width), min(max(corner[1], 0), size - height)


def _paste(
    scans: np.ndarray, digits: np.ndarray, count: int, parameters: DigitsParameters, rng: np.random.Generator
) -> DigitScene:
    """Pastes ``count`` random scans ([K, 8, 8], of ``digits`` [K]) onto a canvas.

    A digit that would leave itself or one below it with less than ``MIN_VISIBLE_FRACTION`` of its ink in sight is
    placed elsewhere, and given up after ``PLACEMENT_ATTEMPTS``.
    """
    size = parameters.image_size
    canvas = paint_canvas(size, rng)
    paper = float(np.clip(canvas.mean((0, 1)) @ LUMA, 0, 255))
    owner = np.full((size, size), -1, dtype=np.int16)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    ink, visible = np.zeros(count), np.zeros(count)
    least, most = parameters.digit_size
    for _ in range(count):
        row = rng.integers(len(scans))
        coverage = ink_of(scans[row], int(rng.integers(least, most + 1)), rng.uniform(0.8, 1.2))
        inked = coverage > INK_THRESHOLD
        height, width = inked.shape
        for _ in range(PLACEMENT_ATTEMPTS):
            x, y = _corner((height, width), size, boxes, rng)
            window = np.s_[y : y + height, x : x + width]
            hidden = np.bincount(owner[window][inked] + 1, minlength=count + 1)[1:]
            if ((visible - hidden) >= MIN_VISIBLE_FRACTION * ink).all():
                break
        else:
            continue
        index = len(boxes)
        visible -= hidden
        visible[index] = ink[index] = inked.sum()
        owner[window][inked] = index
        canvas[window] += coverage[:, :, None] * (ink_colour(paper, rng) - canvas[window])
        boxes.append((x, y, width, height))
        labels.append(int(digits[row]))
    contrast, brightness = rng.uniform(0.75, 1.1), rng.uniform(-15, 15)
    image = np.clip((canvas - 127.5) * contrast + 127.5 + brightness, 0, 255).astype(np.uint8)
    whole = np.array(boxes, dtype=np.int64).reshape(-1, 4), ink[: len(boxes)].astype(np.int64)
    return DigitScene(image, owner, *whole, np.array(labels, dtype=np.int64))


def scene_annotations(scene: DigitScene, image_id: int, first_id: int) -> list[dict]:
    """COCO annotations of a scene: amodal ``bbox``; ``segmentation`` (RLE) and ``area`` of visible ink."""
    encoded = rle.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8)))
    rows = zip(scene.digits.tolist(), scene.boxes.tolist(), rle.area(encoded).tolist(), encoded, strict=True)
    return [
        {"id": number, "image_id": image_id, "category_id": digit + 1, "bbox": box, "area": area, "iscrowd": 0}
        | {"segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")}}
        for number, (digit, box, area, mask) in enumerate(rows, start=first_id)
    ]


def generate_scene(parameters: DigitsParameters, split: str, index: int, scans=None) -> DigitScene:
    """Scene ``index`` of ``split`` ("train" or "val"), which depends on nothing but the arguments.

    ``scans`` is what ``digit_scans(parameters.seed)`` returned, for a caller that makes many scenes. Raises ValueError
    if the fewest digits asked for do not fit in ``SCENE_ATTEMPTS`` scenes.
    """
    rng, (low, high) = np.random.default_rng((parameters.seed, SPLITS.index(split), index)), parameters.digits_per_image
    chosen = (scans or digit_scans(parameters.seed))[split]
    for _ in range(SCENE_ATTEMPTS):
        scene = _paste(*chosen, int(rng.integers(low, high + 1)), parameters, rng)
        if len(scene.digits) >= low:
            return scene
    raise ValueError(
        f"digits_per_image: {low} digits of {parameters.digit_size} pixels do not fit on {parameters.image_size} x "
        f"{parameters.image_size}; expected fewer or smaller digits, or a larger image_size"
    )


def is_digits_folder(out: str | os.PathLike, parameters: DigitsParameters) -> bool:
    """Whether ``out`` holds exactly this data set, told by its ``digits.json``, written last."""
    try:
        return json.loads((Path(out) / PARAMETERS_FILE).read_text(encoding="utf-8")) == parameters.as_json()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def write_digits(out: str | os.PathLike, *, progress: bool = True, **parameters) -> bool:
    """Writes crowded digits as a COCO folder ``out``: ``annotations/``, ``train2017/``, ``val2017/``, ``digits.json``.

    The same ``parameters``, fields of `DigitsParameters`, give the same pixels and annotations, bit for bit; image i
    does not depend on how many there are. Returns True when it wrote, False when ``out`` held exactly this data set
    already. Raises DatasetError when ``out`` holds anything else, ValueError on a parameter out of range.
    """
    parameters = DigitsParameters(**parameters)
    if is_digits_folder(out, parameters):
        return False
    if (Path(out) / PARAMETERS_FILE).is_file():
        raise DatasetError(
            f"{out}: holds crowded digits with other parameters; choose another folder, or delete this one"
        )
    scans, side = digit_scans(parameters.seed), parameters.image_size
    options = {"desc": "crowded digits", "unit": "image", "mininterval": 0.2 if sys.stderr.isatty() else 20.0}
    counts = (parameters.train_images, parameters.val_images)
    with whole_folder(out) as folder, tqdm(total=sum(counts), **options, disable=not progress) as bar:
        for split, count in zip(SPLITS, counts, strict=True):
            (folder / f"{split}2017").mkdir()
            images, annotations = [], []
            for number in range(1, count + 1):
                scene = generate_scene(parameters, split, number - 1, scans)
                name = f"{number:012d}.png"
                Image.fromarray(scene.image).save(folder / f"{split}2017" / name, compress_level=1)
                images.append({"id": number, "file_name": name, "width": side, "height": side})
                annotations += scene_annotations(scene, number, len(annotations) + 1)
                bar.update()
            categories = [{"id": d + 1, "name": str(d), "supercategory": "digit"} for d in range(10)]
            info = {"description": "Crowded digits", "version": str(parameters.generator_version)}
            write_instances(folder, split, images, annotations, categories, **info)
        file = folder / PARAMETERS_FILE
        file.write_text(json.dumps(parameters.as_json(), indent=2) + "\n", encoding="utf-8")
    return True
