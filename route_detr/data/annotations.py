"""Reading a COCO annotation file: checked in full before training, and corrected where that is safe."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from route_detr.data.report import DatasetError, Report

ROUNDING = 1.0
SUSPICIOUS_SHARE = 0.5
LARGEST_NUMBER = 2.0**53
SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoAnnotations:
    """The content of an annotation file that has passed the checks.

    file         where it came from
    images       its ``images``, each with an integer ``id``, ``file_name``, ``width`` and ``height``
    annotations  its ``annotations`` without those that had no area inside their image; ``bbox`` sticks out
                 by less than ``ROUNDING`` pixels; ``area`` and ``iscrowd`` are always there
    categories   its ``categories``, by id, each with ``id`` and ``name``
    report       what was corrected or dropped
    """

    file: Path
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    report: Report


def read_annotations(
    file: str | os.PathLike, size_of: Callable[[str], tuple[int, int]] | None = None
) -> CocoAnnotations:
    """Reads and checks a COCO detection file.

    ``size_of(file_name)`` gives (width, height) where an image's entry lacks them; else that is an error.

    Raises DatasetError, naming file, entry and what was expected, when the file is missing or not JSON, a
    section or key is missing or of the wrong type, an id is not an integer or occurs twice, an annotation
    names an unknown image or category, or a ``bbox`` is not four finite numbers.
    Counted in ``report``: boxes cut at the image's border, boxes dropped because no area is left, sizes
    filled in, areas replaced.
    """
    file = Path(file)
    content = _load(file)
    faults = Report()
    images = _entries(content["images"], "image", faults)
    categories = _entries(content["categories"], "category", faults)
    annotations = _entries(content["annotations"], "annotation", faults)
    _raise_faults(file, faults)
    if not categories:
        raise DatasetError(f"{file}: expected at least one entry in 'categories', found none")

    report = Report()
    _check_images(images, size_of, faults, report)
    _check_references(annotations, {i["id"] for i in images}, {c["id"] for c in categories}, faults)
    _raise_faults(file, faults)
    shapes = {image["id"]: (image["width"], image["height"]) for image in images}
    kept = [a for a in annotations if _fit_to_image(a, shapes[a["image_id"]], report)]
    _check_units(file, kept)
    _hint_at_corners(report, len(annotations))
    _avoid_id_zero(kept)
    for category in categories:
        category.setdefault("name", str(category["id"]))
    return CocoAnnotations(file, images, kept, sorted(categories, key=lambda c: c["id"]), report)


def _load(file: Path) -> dict[str, list]:
    if not file.is_file():
        raise DatasetError(f"{file}: expected a COCO annotation file, found {'a folder' if file.is_dir() else 'none'}")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{file}: expected a JSON object with {', '.join(SECTIONS)}, found {_named(content)}")
    for section in SECTIONS:
        if not isinstance(content.get(section), list):
            found = (
                _named(content[section]) if section in content else f"only {', '.join(sorted(content)) or 'nothing'}"
            )
            raise DatasetError(f"{file}: expected a list {section!r}, found {found}")
    return content


def _named(value: Any) -> str:
    return f"{type(value).__name__} {json.dumps(value)[:60]}"


def _raise_faults(file: Path, faults: Report) -> None:
    if faults:
        raise DatasetError(f"{file}: " + "\n".join(faults.lines()))


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER


def _entries(section: list, noun: str, faults: Report) -> list[dict[str, Any]]:
    """Copies of the entries of a section that are objects with an integer id of their own."""
    seen: set[int] = set()
    entries = []
    for position, entry in enumerate(section):
        if not isinstance(entry, dict):
            faults.add(f"{noun} entries that are not objects", f"number {position} is {_named(entry)}")
        elif not _is_integer(entry.get("id")):
            found = f"has {_named(entry['id'])}" if "id" in entry else "has none"
            faults.add(f"{noun} entries without an integer 'id'", f"number {position} {found}")
        elif entry["id"] in seen:
            faults.add(f"{noun} ids that occur twice", str(entry["id"]))
        else:
            seen.add(entry["id"])
            entries.append(dict(entry))
    return entries


def _check_images(
    images: list[dict], size_of: Callable[[str], tuple[int, int]] | None, faults: Report, report: Report
) -> None:
    for image in images:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            found = _named(name) if "file_name" in image else "none"
            faults.add("images without a 'file_name'", f"image {image['id']} has {found}")
        elif size_of is not None and image.get("width") is None and image.get("height") is None:
            image["width"], image["height"] = size_of(name)
            report.add("image sizes read from the files because 'width' and 'height' are missing", name)
        elif not all(_is_integer(image.get(side)) and image[side] > 0 for side in ("width", "height")):
            found = f"{image.get('width')} x {image.get('height')}"
            faults.add("images whose 'width' and 'height' are not positive integers", f"image {image['id']}: {found}")


def _check_references(annotations: list[dict], image_ids: set[int], category_ids: set[int], faults: Report) -> None:
    for annotation in annotations:
        named = f"annotation {annotation['id']}"
        for key, known in (("image_id", image_ids), ("category_id", category_ids)):
            value = annotation.get(key)
            if key not in annotation:
                faults.add(f"annotations without {key!r}", named)
            elif not _is_integer(value) or value not in known:
                faults.add(
                    f"annotations whose {key!r} names no {key[:-3]} of the file",
                    f"{named} names {_named(value)}",
                )
        box = annotation.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            found = _named(box) if "bbox" in annotation else "none"
            faults.add(
                "annotations whose 'bbox' is not four finite numbers x, y, width, height",
                f"{named} has {found}",
            )
        if annotation.setdefault("iscrowd", 0) not in (0, 1):
            faults.add("annotations whose 'iscrowd' is not 0 or 1", f"{named} has {_named(annotation['iscrowd'])}")


def _fit_to_image(annotation: dict, shape: tuple[int, int], report: Report) -> bool:
    """Cuts the box at the image's border and fills in the area; False when no part of it is in the image."""
    x, y, w, h = (float(edge) for edge in annotation["bbox"])
    width, height = shape
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    named = f"annotation {annotation['id']} of image {annotation['image_id']}: {annotation['bbox']}"
    if w <= 0 or h <= 0:
        report.add("boxes dropped because their width or height is not positive", named)
        return False
    if x1 <= x0 or y1 <= y0:
        report.add("boxes dropped because they lie outside their image", f"{named} in {width} x {height}")
        return False
    cut = max(-x, -y, x + w - width, y + h - height) >= ROUNDING
    if cut:
        report.add("boxes cut at the border of their image", f"{named} in {width} x {height}")
        annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    box_area = (x1 - x0) * (y1 - y0)
    area = annotation.get("area")
    if area is not None and not (_is_number(area) and area >= 0):
        report.add("areas replaced by the box's because they are not numbers >= 0", f"{named}: area {_named(area)}")
        area = None
    annotation["area"] = box_area if area is None else min(area, box_area) if cut else area
    annotation["iscrowd"] = int(annotation["iscrowd"])
    return True


def _check_units(file: Path, annotations: list[dict]) -> None:
    if annotations and all(max(annotation["bbox"]) <= 1 for annotation in annotations):
        raise DatasetError(
            f"{file}: expected boxes in pixels; every box lies inside the first pixel of its image, as if "
            f"given in fractions: annotation {annotations[0]['id']} has {annotations[0]['bbox']}"
        )


def _hint_at_corners(report: Report, total: int) -> None:
    misplaced = sum(count for kind, count in report.counts.items() if kind.startswith("boxes"))
    if misplaced > SUSPICIOUS_SHARE * total:
        report.add(
            "more than half of the boxes do not fit their image",
            "are they x0, y0, x1, y1 rather than COCO's x, y, width, height?",
        )


def _avoid_id_zero(annotations: list[dict]) -> None:
    """Gives annotation 0 a new id: pycocotools' evaluation takes a match with id 0 for no match."""
    for annotation in annotations:
        if annotation["id"] == 0:
            annotation["id"] = 1 + max(other["id"] for other in annotations)


def boxes_of(annotations: list[dict], shape: tuple[int, int]) -> Iterator[tuple[float, float, float, float]]:
    """(x0, y0, x1, y1) of each annotation, cut at the border of an image of ``shape`` = (width, height)."""
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        yield max(x, 0.0), max(y, 0.0), min(x + w, shape[0]), min(y + h, shape[1])
