"""A detection data set in COCO's format, and its folder: COCO's own layout, read and written, or paths one by one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from route_detr.data.annotations import box_inside, read_annotations
from route_detr.data.batches import Target
from route_detr.data.images import cached_rgb, image_file, image_files, judged, note_verdicts, read_rgb
from route_detr.data.report import DatasetError, DatasetWarning, Report
from route_detr.data.transforms import TransformConfig, eval_view, image_pixels, normalised_boxes, train_view

StrPath = str | os.PathLike
HEADERS_CHECKED_UP_TO = 10_000


class CocoDetection(Dataset):
    """Images and objects of a COCO detection file; item i is ``(pixels [3, h, w] uint8, Target)``.

    Categories may have any ids; label k is the k-th smallest id, ``category_ids[k]``. Crowd regions are no targets, but
    stay in ``coco`` for evaluation. Images without boxes stay too. Boxes are in the frame whose size the annotations
    give (see ``images.read_rgb``). An item's augmentation is drawn from a generator seeded with (seed, epoch, index):
    workers, order of access and resuming change nothing. ``set_epoch`` reaches living workers too.

    Args:
        annotation_file: path of the JSON file.
        image_dir: folder that its ``file_name`` entries are relative to (see ``images.image_file``).
        config: sizes and augmentation.
        train: whether to augment, with ``seed``.
        masks: whether targets have masks, from the annotations' polygons or run lengths, all drawn now.
        cache: folder for decoded images, filled as they are first read; workers, ranks, runs and data sets share it.

    The size in every image's header is compared with the annotation file's now for up to ``HEADERS_CHECKED_UP_TO``
    images, else on reading.

    Raises DatasetError for a file that cannot be used (see ``read_annotations``), missing or empty image files, objects
    without a mask that is asked for, and from item access for an image that cannot be decoded or has another size than
    its entry says. Corrections are in ``report`` and given as one DatasetWarning.
    """

    def __init__(
        self,
        annotation_file: StrPath,
        image_dir: StrPath,
        config: TransformConfig,
        *,
        train: bool = False,
        seed: int = 0,
        masks: bool = False,
        cache: StrPath | None = None,
    ) -> None:
        self.annotation_file, self.image_dir = Path(annotation_file), Path(image_dir)
        self.config, self.train, self.seed, self.cache = config, train, seed, None if cache is None else Path(cache)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if not self.image_dir.is_dir():
            raise DatasetError(f"{image_dir}: expected the folder of the images of {annotation_file}, found none")
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise DatasetError(f"cache: expected a folder, {cache} is a file")
        content = read_annotations(self.annotation_file, masks)
        self.report = content.report
        self.category_ids: list[int] = [category["id"] for category in content.categories]
        self.category_names: list[str] = [category["name"] for category in content.categories]
        self.image_ids: list[int] = [image["id"] for image in content.images]
        self.file_names: list[str] = [image["file_name"] for image in content.images]
        self._sizes = np.array([(i["width"], i["height"]) for i in content.images], dtype=np.int64).reshape(-1, 2)
        self._index_objects(content.annotations, masks)
        self._check_files(headers=len(self) <= HEADERS_CHECKED_UP_TO)
        if self.report:
            warnings.warn(f"{self.annotation_file}:\n{self.report}", DatasetWarning, stacklevel=2)

    def _index_objects(self, annotations: list[dict], masks: bool) -> None:
        """Boxes (x0, y0, x1, y1), labels and masks of all images one after another; where each image's begin and end.

        Arrays, not objects: a forked worker that only reads them shares their memory.
        """
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        of_image: dict[int, list[dict]] = defaultdict(list)
        for annotation in annotations:
            if not annotation["iscrowd"]:
                of_image[annotation["image_id"]].append(annotation)
        sizes = zip(self.image_ids, self._sizes.tolist(), strict=True)
        objects = [(each, size) for number, size in sizes for each in of_image[number]]
        boxes = [box_inside(each["bbox"], size) for each, size in objects]
        self._boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        self._starts = np.cumsum([0, *(len(of_image[number]) for number in self.image_ids)])
        self._labels = np.array([label_of[each["category_id"]] for each, _ in objects], dtype=np.int64)
        self._masks = None
        if masks:
            encoded = [each["segmentation"]["counts"] for each, _ in objects]
            self._masks = np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum([0, *map(len, encoded)])

    def _check_files(self, headers: bool) -> None:
        files = image_files(self.image_dir, self.file_names, self.report)
        sizes, faults = map(tuple, self._sizes.tolist()), Report()
        if headers:
            note_verdicts(map(str, files), map(judged, files, sizes), faults, self.report)
        for file in () if headers else files:
            if not (os.path.isfile(file) and file.stat().st_size):
                kind = "empty" if os.path.isfile(file) else "no such file"
                faults.add("image files that cannot be used", f"{file}: {kind}")
        if faults:
            raise DatasetError(f"{self.annotation_file}: of {len(self)} images:\n{faults}")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    @property
    def num_boxes(self) -> int:
        """Boxes to train on, all images together, without crowd regions."""
        return len(self._labels)

    @property
    def landscape(self) -> np.ndarray:
        """[len(self)] bool: images at least as wide as high."""
        return self._sizes[:, 0] >= self._sizes[:, 1]

    def set_epoch(self, epoch: int) -> None:
        """Makes the following item accesses draw the augmentation of ``epoch``, in worker processes too."""
        self._epoch.fill_(epoch)

    def raw_image(self, index: int) -> Image.Image:
        """The image in RGB, in the frame of its boxes, before any transform."""
        file, size = image_file(self.image_dir, self.file_names[index]), tuple(self._sizes[index].tolist())
        return read_rgb(file, size) if self.cache is None else cached_rgb(file, size, self.cache)

    def boxes(self, index: int) -> Tensor:
        """[T, 4] float32 (x0, y0, x1, y1) in pixels of ``raw_image(index)``, without crowd regions."""
        return torch.from_numpy(self._boxes[self._rows(index)].astype(np.float32))

    def labels(self, index: int) -> Tensor:
        """[T] int64 of ``boxes(index)``."""
        return torch.from_numpy(self._labels[self._rows(index)].copy())

    def _rows(self, index: int) -> slice:
        return slice(self._starts[index], self._starts[index + 1])

    def masks(self, index: int) -> np.ndarray:
        """[H, W, T] uint8 of ``boxes(index)``; ValueError in a data set opened without masks."""
        if self._masks is None:
            raise ValueError("masks: expected a data set opened with masks=True")
        (counts, ends), rows = self._masks, self._rows(index)
        size = self._sizes[index].tolist()[::-1]
        encoded = [
            {"size": size, "counts": counts[ends[row] : ends[row + 1]].tobytes()}
            for row in range(rows.start, rows.stop)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools' own, on NumPy 2
            return rle.decode(encoded) if encoded else np.zeros((*size, 0), dtype=np.uint8)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        image = self.raw_image(index)
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        view = train_view(image.size, self.config, rng) if self.train else eval_view(image.size, self.config)
        boxes = view.boxes(self._boxes[self._rows(index)])
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = Target(
            image_id=self.image_ids[index],
            boxes=normalised_boxes(boxes[kept], view.size),
            labels=self.labels(index)[kept],
            size=view.size[::-1],
            original_size=image.size[::-1],
        )
        if self._masks is not None:
            target.masks = torch.from_numpy(view.masks(self.masks(index)[..., kept])).view(torch.bool)
        return image_pixels(view.image(image)), target

    @cached_property
    def coco(self) -> COCO:
        """The checked annotations, crowd regions and segmentations included, for pycocotools' evaluation.

        Read from the file on first use: a training set that is never evaluated does not hold it in memory.
        """
        content = read_annotations(self.annotation_file, masks=self._masks is not None)
        ground_truth = COCO()
        sections = {name: getattr(content, name) for name in ("images", "annotations", "categories")}
        ground_truth.dataset = {"info": {}, **sections}
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth.createIndex()
        return ground_truth

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "coco"}


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
    first, second = (dict(zip(each.category_ids, each.category_names, strict=True)) for each in opened)
    differing = [n for n in sorted({*first, *second}) if first.get(n) != second.get(n)]
    if differing:
        shown = "; ".join(
            f"id {n} is {first.get(n, 'absent')!r} and {second.get(n, 'absent')!r}" for n in differing[:3]
        )
        raise DatasetError(
            f"{train.annotation_file} and {val.annotation_file}: expected the same categories, "
            f"{len(differing)} differ: {shown}"
        )
    for dataset in opened:
        if dataset.num_boxes == 0:
            raise DatasetError(
                f"{dataset.annotation_file}: expected at least one box that is no crowd region, "
                f"found none in {len(dataset)} images"
            )
    return train, val


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
