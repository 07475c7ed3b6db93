"""A detection data set in COCO's format."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from route_detr.data.annotations import CocoAnnotations, boxes_of, read_annotations
from route_detr.data.batch import Target
from route_detr.data.images import check_header, header_size, read_rgb
from route_detr.data.report import DatasetError, DatasetWarning, Report
from route_detr.data.transforms import Scene, Transform, normalised, normalised_boxes

HEADERS_CHECKED_UP_TO = 10_000


class CocoDetection(Dataset):
    """Images and boxes of a COCO detection file; item i is ``(image [3, h, w] float32, Target)``.

    Categories may have any ids; label k is the k-th smallest id, ``category_ids[k]``. Crowd regions are no
    targets, but stay in ``coco`` for evaluation. Images without boxes are kept. Images may be stored in any
    mode (see ``images.as_rgb``) and with an EXIF orientation; boxes are read in the frame whose size the
    annotation file gives (see ``images.upright``).

    Every random choice of the transforms for an item comes from a generator seeded with (seed, epoch, index):
    the number of workers, the order of access and resuming change nothing. ``set_epoch`` reaches living
    workers too.

    Args:
        annotation_file: path of the JSON file.
        image_dir: folder that its ``file_name`` entries are relative to.
        transforms: what ``train_transforms`` or ``eval_transforms`` returned.
        seed: of the augmentation.
        check_headers: whether to open every image's header now and compare its size with the annotation
            file's; by default for up to ``HEADERS_CHECKED_UP_TO`` images. Else it is checked on reading.

    Raises DatasetError for a file that cannot be used (see ``read_annotations``), missing or empty image
    files, and from item access for an image that cannot be decoded or has another size than its entry says.
    Corrections are counted in ``report`` and given as one DatasetWarning.
    """

    def __init__(
        self,
        annotation_file: str | os.PathLike,
        image_dir: str | os.PathLike,
        transforms: Transform,
        *,
        seed: int = 0,
        check_headers: bool | None = None,
    ) -> None:
        self.annotation_file, self.image_dir = Path(annotation_file), Path(image_dir)
        self.transforms = transforms
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if not self.image_dir.is_dir():
            raise DatasetError(
                f"{self.image_dir}: expected the folder of the images of {self.annotation_file}, found none"
            )
        content = self._read()
        self.report: Report = content.report
        self.category_ids: list[int] = [category["id"] for category in content.categories]
        self.category_names: list[str] = [str(category["name"]) for category in content.categories]
        self.image_ids: list[int] = [image["id"] for image in content.images]
        self.file_names: list[str] = [image["file_name"] for image in content.images]
        self._sizes = np.array([(i["width"], i["height"]) for i in content.images], dtype=np.int64).reshape(-1, 2)
        self._boxes, self._labels, self._starts = self._objects(content)
        self._require_files()
        if check_headers or (check_headers is None and len(self) <= HEADERS_CHECKED_UP_TO):
            self._require_headers()
        if self.report:
            warnings.warn(f"{self.annotation_file}:\n{self.report}", DatasetWarning, stacklevel=2)

    def _read(self) -> CocoAnnotations:
        return read_annotations(self.annotation_file, lambda name: header_size(self.image_dir / name))

    def _objects(self, content: CocoAnnotations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes [T, 4] (x0, y0, x1, y1) and labels [T] of all images; where each image's begin and end."""
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        of_image: dict[int, list[dict]] = defaultdict(list)
        for annotation in content.annotations:
            if not annotation["iscrowd"]:
                of_image[annotation["image_id"]].append(annotation)
        boxes, labels, starts = [], [], [0]
        for image_id, shape in zip(self.image_ids, self._sizes.tolist(), strict=True):
            boxes += boxes_of(of_image[image_id], shape)
            labels += [label_of[annotation["category_id"]] for annotation in of_image[image_id]]
            starts.append(len(labels))
        return (
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(starts),
        )

    def _require_files(self) -> None:
        folders: dict[str, list[str]] = defaultdict(list)
        for name in self.file_names:
            folder, base = os.path.split(name)
            folders[folder].append(base)
        faults = Report()
        for folder, names in folders.items():
            path = self.image_dir / folder
            sizes = {}
            if path.is_dir():
                with os.scandir(path) as entries:
                    sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            for name in names:
                if not sizes.get(name):
                    faults.add("image files empty" if name in sizes else "image files missing", str(path / name))
        if faults:
            raise DatasetError(f"{self.annotation_file}: of {len(self)} images:\n{faults}")

    def _require_headers(self) -> None:
        faults = Report()
        for name, (width, height) in zip(self.file_names, self._sizes.tolist(), strict=True):
            try:
                check_header(self.image_dir / name, (width, height))
            except DatasetError as error:
                faults.add("image files that do not fit the annotation file", str(error))
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

    def set_epoch(self, epoch: int) -> None:
        """Makes the following item accesses draw the augmentation of ``epoch``, in worker processes too."""
        self._epoch.fill_(epoch)

    def raw_image(self, index: int) -> Image.Image:
        """The image in RGB, in the frame of its boxes, before any transform."""
        width, height = self._sizes[index].tolist()
        return read_rgb(self.image_dir / self.file_names[index], (width, height))

    def boxes(self, index: int) -> Tensor:
        """[T, 4] float32 (x0, y0, x1, y1) in pixels of ``raw_image(index)``, without crowd regions."""
        return torch.from_numpy(self._boxes[self._rows(index)].astype(np.float32))

    def labels(self, index: int) -> Tensor:
        """[T] int64 of ``boxes(index)``."""
        return torch.from_numpy(self._labels[self._rows(index)].copy())

    def _rows(self, index: int) -> slice:
        return slice(self._starts[index], self._starts[index + 1])

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        rows = self._rows(index)
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        scene = self.transforms(Scene(self.raw_image(index), self._boxes[rows], self._labels[rows].copy()), rng)
        width, height = scene.image.size
        original_width, original_height = self._sizes[index].tolist()
        target = Target(
            image_id=self.image_ids[index],
            boxes=normalised_boxes(scene.boxes, width, height),
            labels=torch.from_numpy(scene.labels),
            size=(height, width),
            original_size=(original_height, original_width),
        )
        return normalised(scene.image), target

    @cached_property
    def coco(self) -> COCO:
        """The checked annotations, crowd regions and segmentations included, for pycocotools' evaluation.

        Read from the file on first use: a training set that is never evaluated does not hold it in memory.
        """
        content = self._read()
        ground_truth = COCO()
        ground_truth.dataset = {
            "info": {},
            "images": content.images,
            "annotations": content.annotations,
            "categories": content.categories,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth.createIndex()
        return ground_truth

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "coco"}
