"""Where a data set's files are: COCO's own folder layout, or paths given one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from route_detr.data.coco import CocoDetection
from route_detr.data.report import DatasetError
from route_detr.data.transforms import TransformConfig, eval_transforms, train_transforms

StrPath = str | os.PathLike


@dataclass(frozen=True)
class SplitPaths:
    """The annotation file of one split and the folder of its images."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class CocoLayout:
    """The splits of a data set; None where a split was not asked for."""

    train: SplitPaths | None
    val: SplitPaths | None


def coco_layout(
    root: StrPath | None = None,
    *,
    train_json: StrPath | None = None,
    train_images: StrPath | None = None,
    val_json: StrPath | None = None,
    val_images: StrPath | None = None,
    splits: Sequence[str] = ("train", "val"),
) -> CocoLayout:
    """Paths of ``splits``: what is given explicitly, else ``ROOT/annotations/instances_{train,val}2017.json``
    and ``ROOT/{train,val}2017``.

    Raises DatasetError that lists all that was looked for and not found, or not given.
    """
    explicit = {"train": (train_json, train_images), "val": (val_json, val_images)}
    if unknown := set(splits) - set(explicit):
        raise ValueError(f"splits: expected some of {sorted(explicit)}, got {sorted(unknown)}")
    missing: list[str] = []
    found = {split: _split_paths(root, split, *explicit[split], missing) for split in splits}
    if missing:
        given = "explicit paths only" if root is None else f"{Path(root)}"
        raise DatasetError(f"no COCO data set found from {given}; looked for\n" + "\n".join(missing))
    return CocoLayout(found.get("train"), found.get("val"))


def _split_paths(
    root: StrPath | None, split: str, json_path: StrPath | None, images: StrPath | None, missing: list[str]
) -> SplitPaths | None:
    if root is not None:
        json_path = json_path or Path(root) / "annotations" / f"instances_{split}2017.json"
        images = images or Path(root) / f"{split}2017"
    for option, path, kind in (("json", json_path, "file"), ("images", images, "folder")):
        if path is None:
            missing.append(f"  --{split}-{option}: not given, and neither is a root folder")
        elif not (Path(path).is_file() if kind == "file" else Path(path).is_dir()):
            missing.append(f"  {kind} {path} (or another given with --{split}-{option})")
    return SplitPaths(Path(json_path), Path(images)) if json_path is not None and images is not None else None


def open_splits(layout: CocoLayout, config: TransformConfig, seed: int = 0) -> tuple[CocoDetection, CocoDetection]:
    """The training set, with augmentation, and the validation set of a layout that has both.

    Raises DatasetError when their category tables differ, or when one has no image or no box.
    """
    if layout.train is None or layout.val is None:
        raise ValueError("layout: expected both splits, got one")
    train = CocoDetection(layout.train.annotations, layout.train.images, train_transforms(config), seed=seed)
    val = CocoDetection(layout.val.annotations, layout.val.images, eval_transforms(config))
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
    tables = [dict(zip(dataset.category_ids, dataset.category_names, strict=True)) for dataset in (train, val)]
    differing = [
        number for number in sorted({*tables[0], *tables[1]}) if tables[0].get(number) != tables[1].get(number)
    ]
    if differing:
        shown = "; ".join(
            f"id {number} is {tables[0].get(number, 'absent')!r} and {tables[1].get(number, 'absent')!r}"
            for number in differing[:3]
        )
        raise DatasetError(
            f"{train.annotation_file} and {val.annotation_file}: expected the same categories, "
            f"{len(differing)} differ: {shown}"
        )
