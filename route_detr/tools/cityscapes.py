"""Cityscapes (Cordts et al., arXiv 1604.01685) as a COCO folder, with its 8 classes of things."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from route_detr.data.coco import whole_folder, write_instances
from route_detr.data.images import opened
from route_detr.data.report import DatasetError, Report

THINGS = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
IDS_PER_CLASS = 1000  # an instance has the id 1000 class + number; a group that nobody took apart has its class's


def write_cityscapes(root: str | os.PathLike, out: str | os.PathLike, workers: int | None = None) -> dict[str, int]:
    """Converts ``ROOT/leftImg8bit`` and ``ROOT/gtFine`` of train and val; returns each split's number of objects.

    ``out`` gets ``annotations/instances_{train,val}2017.json`` with masks as run lengths, groups as crowd regions, and
    ``train2017`` and ``val2017`` as links to the images, which stay. Raises DatasetError when ``out`` holds
    anything, or names what is missing in ``root``.
    """
    root, counts = Path(root).resolve(), {}
    with whole_folder(out) as folder:
        for split in ("train", "val"):
            pictures = root / "leftImg8bit" / split
            truths = _instance_files(root, split)
            images, annotations = [], []
            with ProcessPoolExecutor(workers) as pool:
                found = pool.map(instances, truths.values(), chunksize=8)
                bar = tqdm(found, split, len(truths), mininterval=0.2 if sys.stderr.isatty() else 20.0)
                for name, (size, objects) in zip(truths, bar, strict=True):
                    images.append({"id": len(images) + 1, "file_name": name, "width": size[0], "height": size[1]})
                    for each in objects:
                        annotations.append({"id": len(annotations) + 1, "image_id": len(images), **each})
            categories = [{"id": number, "name": name} for number, name in THINGS.items()]
            write_instances(folder, split, images, annotations, categories, description="Cityscapes")
            (folder / f"{split}2017").symlink_to(pictures, target_is_directory=True)
            counts[split] = len(annotations)
    return counts


def _instance_files(root: Path, split: str) -> dict[str, Path]:
    """The file of instance ids of each image, whose names are relative to the split's folder."""
    pictures, suffix = root / "leftImg8bit" / split, "_leftImg8bit.png"
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.glob(f"*/*{suffix}"))
    if not names:
        raise DatasetError(f"{pictures}: expected a folder of each city with files *{suffix}, found none")
    files = {n: root / "gtFine" / split / f"{n.removesuffix(suffix)}_gtFine_instanceIds.png" for n in names}
    faults = Report()
    for file in files.values():
        if not file.is_file():
            faults.add("files of instance ids missing", str(file))
    if faults:
        raise DatasetError(f"{root}: of {len(files)} images of {split}:\n{faults}")
    return files


def instances(file: Path) -> tuple[tuple[int, int], list[dict]]:
    """(width, height) and the things of an image of instance ids, as parts of COCO annotations."""
    with opened(file) as found:
        ids = np.asarray(found.image).astype(np.int64)
    objects = []
    for number in np.flatnonzero(np.bincount(ids.ravel().clip(0))).tolist():
        category, crowd = (number // IDS_PER_CLASS, 0) if number >= IDS_PER_CLASS else (number, 1)
        if category in THINGS:
            mask = rle.encode(np.asfortranarray(ids == number, dtype=np.uint8))
            area, box = int(rle.area(mask)), rle.toBbox(mask).tolist()
            objects.append(
                {"category_id": category, "iscrowd": crowd, "area": area, "bbox": box}
                | {"segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")}}
            )
    return ids.shape[::-1], objects
