"""Reading a COCO annotation file: checked in full before training, and corrected where that is safe."""

from __future__ import annotations

import codecs
import contextlib
import gc
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import NotRequired, TypedDict

from route_detr.data.report import DatasetError, Report
from route_detr.data.segmentations import compress_masks

ROUNDING = 1.0  # pixels by which a box may stick out of its image
LARGEST = 2.0**53
Number = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]


class _Entry(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)

    id: int


class _Image(_Entry):
    file_name: Annotated[str, Field(min_length=1)]
    width: PositiveInt
    height: PositiveInt


class _Annotation(_Entry):
    image_id: int
    category_id: int
    bbox: Annotated[list[Number], Field(min_length=4, max_length=4)]
    area: NotRequired[Annotated[Number, Field(ge=0)] | None]
    iscrowd: NotRequired[Literal[0, 1] | None]


class _Content(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Entry]


CONTENT = TypeAdapter(_Content)
SECTIONS = tuple(_Content.__annotations__)


@dataclass(frozen=True)
class CocoAnnotations:
    """The content of an annotation file, without entries that have not the right form or name no other.

    images       its ``images``
    annotations  its ``annotations`` without those that had no area inside their image; ``bbox`` sticks out by less than
                 `ROUNDING` pixels; ``area`` and ``iscrowd`` are always there; where masks were asked for,
                 ``segmentation`` is run lengths that fill the image
    categories   its ``categories``, by id, each with a ``name``, else its id as text
    report       what was corrected or dropped
    faults       what makes the file unfit for training
    """

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    report: Report
    faults: Report


def read_annotations(file: Path, masks: bool = False) -> CocoAnnotations:
    """`inspect_annotations` of a file to train or evaluate with. Raises DatasetError that counts all its faults."""
    content = inspect_annotations(file, masks)
    if content.faults:
        raise DatasetError(f"{file}: {content.faults}")
    return content


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection: nothing that is read from a file is in a cycle, and each would walk through all of it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_collections()
def inspect_annotations(file: Path, masks: bool = False) -> CocoAnnotations:
    """Reads and judges a COCO detection file in one pass, whatever is in it.

    ``faults`` has everything of these kinds: the file is not JSON, a section or key is missing or of the wrong type, an
    id occurs twice, an annotation names an unknown image or category, boxes are given in fractions. ``report`` has
    boxes cut at the image's border, and boxes dropped because no area is left. With `masks`, each ``segmentation``
    becomes run lengths and is judged too, see `compress_masks`. Raises DatasetError where there is no file.
    """
    if not file.is_file():
        raise DatasetError(f"{file}: expected a COCO annotation file, found {'a folder' if file.is_dir() else 'none'}")
    faults, report = Report(), Report()
    content, broken = _content(file.read_bytes().removeprefix(codecs.BOM_UTF8), faults)
    for section, entries in content.items():
        seen: set[int] = set()
        for entry in entries:
            if entry["id"] in seen:
                faults.add(f"{section}: ids that occur twice", str(entry["id"]))
            seen.add(entry["id"])
    if not content["categories"] and "categories" not in broken:
        faults.add("categories should have at least 1 item", "categories is []")
    images = {image["id"]: image for image in content["images"]}
    categories = {each["id"]: each | {"name": _name(each)} for each in content["categories"]}
    usable = []
    for annotation in content["annotations"]:
        unknown = [
            (key, section)
            for key, section, entries in (("image_id", "images", images), ("category_id", "categories", categories))
            if annotation[key] not in entries
        ]
        for key, section in unknown:
            if section not in broken:  # else the entry named may be one that is at fault itself
                named = f"annotation {annotation['id']} names {annotation[key]}"
                faults.add(f"annotations whose '{key}' names no {key[:-3]} of the file", named)
        if not unknown:
            usable.append(annotation)
    kept = [each for each in usable if _fits(each, images[each["image_id"]], report)]
    if kept and all(max(annotation["bbox"]) <= 1 for annotation in kept):
        kind = "expected boxes in pixels; every box lies inside the first pixel of its image, as if given in fractions"
        for annotation in kept:
            faults.add(kind, f"annotation {annotation['id']} has {annotation['bbox']}")
    if 2 * sum(map(len, report.values())) > len(usable):
        hint = "are they x0, y0, x1, y1 rather than COCO's x, y, width, height?"
        report.add("more than half of the boxes do not fit their image", hint)
    named: dict[str, list[int]] = {}
    for number, category in categories.items():
        named.setdefault(category["name"], []).append(number)
    for name, numbers in named.items():
        if len(numbers) > 1:
            report.add("names that several categories have, which stay apart", f"{name!r} of {numbers}")
    if masks:
        compress_masks(kept, {n: (image["width"], image["height"]) for n, image in images.items()}, faults, report)
    for annotation in kept:
        if annotation["id"] == 0:  # pycocotools' evaluation takes a match with id 0 for no match
            annotation["id"] = 1 + max(other["id"] for other in kept)
    return CocoAnnotations(
        content["images"], kept, [categories[number] for number in sorted(categories)], report, faults
    )


def _content(text: bytes, faults: Report) -> tuple[dict[str, list[dict]], set[str]]:
    """The entries that have the right form, by section, and the sections in which something has not."""
    try:
        return CONTENT.validate_json(text), set()
    except ValidationError as error:
        every = error.errors(include_url=False, include_context=False)
    right: dict[str, list] = {section: [] for section in SECTIONS}
    if every[0]["type"] == "json_invalid":
        faults.add(every[0]["msg"], f"the file begins with {text[:20]!r}")
        return right, {*SECTIONS}
    wrong: dict[str, set[int]] = {}
    whole = set(SECTIONS)
    for fault in every:
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"]).lstrip(".")
        found = f"is {reprlib.repr(fault['input'])}"
        if fault["type"] == "missing":
            found = f"is missing in {reprlib.repr(fault['input'])}" if len(fault["loc"]) > 1 else "is missing"
        faults.add(fault["msg"], f"{place or 'the file'} {found}")
        if len(fault["loc"]) < 2:
            whole -= {*(fault["loc"] or SECTIONS)}
        else:
            wrong.setdefault(fault["loc"][0], set()).add(fault["loc"][1])
    for section in whole:
        entries = from_json(text)[section]
        right[section] = [entry for number, entry in enumerate(entries) if number not in wrong.get(section, ())]
    return CONTENT.validate_python(right), {*SECTIONS} - whole | {*wrong}


def _name(category: dict) -> str:
    name = category.get("name")
    return str(category["id"] if name in (None, "") else name)


def _fits(annotation: dict, image: dict, report: Report) -> bool:
    """Cuts the box at the image's border and fills in the area; False when no part of it is in the image."""
    x, y, w, h = annotation["bbox"]
    width, height = image["width"], image["height"]
    x0, y0, x1, y1 = box_inside(annotation["bbox"], (width, height))
    kind = None
    if w <= 0 or h <= 0:
        kind = "boxes dropped because their width or height is not positive"
    elif x1 <= x0 or y1 <= y0:
        kind = "boxes dropped because they lie outside their image"
    elif max(-x, -y, x + w - width, y + h - height) >= ROUNDING:
        kind = "boxes cut at the border of their image"
    if kind:
        report.add(
            kind, f"annotation {annotation['id']} of image {image['id']}: {annotation['bbox']} in {width} x {height}"
        )
    if kind and "dropped" in kind:
        return False
    area = annotation.get("area")
    annotation["area"] = inside = (x1 - x0) * (y1 - y0) if area is None else area
    if kind:
        annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": min(inside, (x1 - x0) * (y1 - y0))}
    annotation["iscrowd"] = annotation.get("iscrowd") or 0
    return True


def box_inside(bbox: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) as (x0, y0, x1, y1), cut at the border of an image of `size` = (width, height)."""
    x, y, w, h = bbox
    return max(x, 0.0), max(y, 0.0), min(x + w, size[0]), min(y + h, size[1])
