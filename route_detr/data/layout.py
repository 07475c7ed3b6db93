"""Where a data set's files are: COCO's own folder layout, read and written, or paths given one by one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from route_detr.data.coco import CocoDetection
from route_detr.data.report import DatasetError
from route_detr.data.transforms import TransformConfig

StrPath = str | os.PathLike


class SplitPaths(NamedTuple):
    """The annotation file of one split and the folder of its images."""

    annotations: Path
    images: Path


class CocoLayout(NamedTuple):
    """The splits of a data set; None where a split was not asked for."""

    train: SplitPaths | None = None
    val: SplitPaths | None = None


def coco_layout(
    root: StrPath | None = None, *, splits: Sequence[str] = ("train", "val"), **given: StrPath | None
) -> CocoLayout:
    """Paths of ``splits``: what is given as ``train_json``, ``train_images``, ``val_json`` or ``val_images``, else
    ``ROOT/annotations/instances_{train,val}2017.json`` and ``ROOT/{train,val}2017``.

    Raises DatasetError that lists all that was looked for and not found, or not given.
    """
    if unknown := set(splits) - {"train", "val"}:
        raise ValueError(f"splits: expected some of ['train', 'val'], got {sorted(unknown)}")
    missing: list[str] = []
    found = {}
    for split in splits:
        paths = {"json": f"annotations/instances_{split}2017.json", "images": f"{split}2017"}
        for kind, usual in paths.items():
            path = given.get(f"{split}_{kind}") or (None if root is None else Path(root) / usual)
            if path is None:
                missing.append(f"  --{split}-{kind}: not given, and neither is a root folder")
            elif not (Path(path).is_file() if kind == "json" else Path(path).is_dir()):
                noun = "file" if kind == "json" else "folder"
                missing.append(f"  {noun} {path} (or another given with --{split}-{kind})")
            paths[kind] = Path(path or "")
        found[split] = SplitPaths(*paths.values())
    if missing:
        start = "explicit paths only" if root is None else f"{Path(root)}"
        raise DatasetError(f"no COCO data set found from {start}; looked for:\n" + "\n".join(missing))
    return CocoLayout(**found)


def open_splits(
    layout: CocoLayout, config: TransformConfig, seed: int = 0, masks: bool = False, cache: StrPath | None = None
) -> tuple[CocoDetection, CocoDetection]:
    """The training set, with augmentation, and the validation set of a layout that has both.

    masks and cache (a folder, for the training images) are those of `CocoDetection`, whose errors come too, of both in
    one. Raises DatasetError when the category tables differ, or when one set has no image or no box.
    """
    if layout.train is None or layout.val is None:
        raise ValueError("layout: expected both splits, got one")
    opened, faults = [], []
    for paths, options in zip(layout, ({"train": True, "seed": seed, "cache": cache}, {}), strict=True):
        try:
            opened.append(CocoDetection(*paths, config, masks=masks, **options))
        except DatasetError as error:
            faults.append(str(error))
    if faults:
        raise DatasetError("\n".join(faults))
    train, val = opened
    require_same_categories(train, val)
    for dataset in (train, val):
        if dataset.num_boxes == 0:
            raise DatasetError(
                f"{dataset.annotation_file}: expected at least one box that is no crowd region, "
                f"found none in {len(dataset)} images"
            )
    return train, val


def require_same_categories(train: CocoDetection, val: CocoDetection) -> None:
    """Raises DatasetError naming the first entries in which the two category tables differ."""
    first, second = (dict(zip(each.category_ids, each.category_names, strict=True)) for each in (train, val))
    differing = [n for n in sorted({*first, *second}) if first.get(n) != second.get(n)]
    if differing:
        shown = "; ".join(
            f"id {n} is {first.get(n, 'absent')!r} and {second.get(n, 'absent')!r}" for n in differing[:3]
        )
        raise DatasetError(
            f"{train.annotation_file} and {val.annotation_file}: expected the same categories, "
            f"{len(differing)} differ: {shown}"
        )


def write_instances(folder: Path, split: str, images: list, annotations: list, categories: list, **info: str) -> None:
    """Writes ``annotations/instances_{split}2017.json`` of a COCO folder."""
    file = folder / "annotations" / f"instances_{split}2017.json"
    file.parent.mkdir(exist_ok=True)
    content = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content), encoding="utf-8")


@contextlib.contextmanager
def whole_folder(out: StrPath) -> Iterator[Path]:
    """A folder to write to, beside ``out``, that becomes ``out`` when all went well and is deleted when not.

    Raises DatasetError when ``out`` holds anything.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found = "other files" if out.is_dir() else "a file"
        raise DatasetError(f"{out}: expected an empty or absent folder to write to, found {found}")
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
