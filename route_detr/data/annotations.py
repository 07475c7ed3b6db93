"""Reading a COCO annotation file: checked in full before training, and corrected where that is safe.

Segmentations become run lengths. They are checked here too: pycocotools' C trusts whatever it is given.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pycocotools import mask as rle
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import NotRequired, TypedDict

from route_detr.data.report import DatasetError, Report

ROUNDING = 1.0  # pixels by which a box may stick out of its image
LARGEST = 2.0**53
REACH = 4096  # pixels outside its image up to which a polygon is drawn as it is
LONGEST = 2**24  # pixels of an outline; pycocotools takes 80 bytes for each
MOST_PIXELS = 2**31
MOST_DIGITS = 7  # of a number below MOST_PIXELS
TOGETHER = 512  # run lengths added up at once

NO_MASK = "expected a segmentation: polygons of three or more points, or run lengths, of each object"
MALFORMED = "expected a segmentation: polygons [[x, y, x, y, ...], ...] or run lengths with 'size' and 'counts'"
OTHER_SIZE = "expected run lengths of the image's size"
DAMAGED = "expected run lengths, which are damaged"

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
def without_collections() -> Iterator[None]:
    """No garbage collection inside the block: one would walk through all that is made there, whenever Python likes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@without_collections()
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


class _Fault(ValueError):
    """Its arguments are the kind and what was found."""


def compress_masks(
    annotations: Sequence[dict[str, Any]], sizes: Mapping[int, tuple[int, int]], faults: Report, report: Report
) -> None:
    """Makes each ``segmentation`` run lengths {"size": [height, width], "counts": bytes} that fill its image.

    ``sizes`` has the (width, height) of each image. A crowd region without a segmentation gets its box; an object of
    whose polygons none is left becomes such a region. Shapes that cannot be drawn stay and are in ``faults``;
    ``report`` counts what was left out or cut.
    """
    given: list[tuple[dict, bytes]] = []
    encoded: list[dict] = []
    for annotation in annotations:
        found, size = annotation.get("segmentation"), sizes[annotation["image_id"]]
        try:
            if size[0] * size[1] >= MOST_PIXELS:
                raise _Fault("expected masks of less than 2^31 pixels", f"{size[0]} x {size[1]}")
            if isinstance(found, dict) and found:
                given.append((annotation, _given(found, size)))
            else:
                annotation["segmentation"] = _drawn(annotation, size, report)
                encoded.append(annotation)
        except _Fault as fault:
            faults.add(fault.args[0], f"{_named(annotation)}: {fault.args[1]}")
    for start in range(0, len(given), TOGETHER):
        some = given[start : start + TOGETHER]
        for (annotation, counts), pixels in zip(some, pixel_sums([each for _, each in some]).tolist(), strict=True):
            width, height = sizes[annotation["image_id"]]
            if pixels == width * height:
                annotation["segmentation"] = {"size": [height, width], "counts": counts}
                encoded.append(annotation)
            elif pixels < 0:
                faults.add(DAMAGED, f"{_named(annotation)}: {reprlib.repr(counts)}")
            else:
                faults.add(OTHER_SIZE, f"{_named(annotation)}: {pixels} pixels in {width} x {height}")
    for annotation in encoded:  # one by one: under NumPy 2 pycocotools fails with more than 255
        mask = annotation["segmentation"]
        if len(mask["counts"]) <= MOST_DIGITS and not rle.area(mask):  # one number
            report.add("masks without a pixel of their image", _named(annotation))


def _named(annotation: dict[str, Any]) -> str:
    return f"annotation {annotation['id']} of image {annotation['image_id']}"


def _drawn(annotation: dict[str, Any], size: tuple[int, int], report: Report) -> dict[str, Any]:
    """Run lengths of the polygons, or of a crowd region's box where there are none."""
    found = annotation.get("segmentation")
    if found and not (isinstance(found, list) and all(isinstance(part, list) for part in found)):
        raise _Fault(MALFORMED, reprlib.repr(found))
    polygons = []
    for part in found or ():
        if len(part) % 2:
            report.add("polygons with an odd number of values, whose last is ignored", _named(annotation))
        if len(part) < 6:
            report.add("polygons left out because they have fewer than three points", _named(annotation))
            continue
        points = _numbers(part)
        furthest = np.inf if points is None else np.abs(points).max()
        if not furthest <= LARGEST:
            raise _Fault("expected polygons of finite numbers up to 2^53", reprlib.repr(part))
        points = points[: len(part) // 2 * 2].reshape(-1, 2)
        least, most = -REACH, np.add(size, REACH)
        if furthest > REACH and ((points < least) | (points > most)).any():
            report.add(f"polygons cut {REACH} pixels outside their image", _named(annotation))
            points = cut_polygon(points, least, most)
        if len(points) * max(most - least) > LONGEST and _outline(points) > LONGEST:
            raise _Fault("expected polygons with an outline of at most 2^24 pixels", f"{len(points)} points")
        polygons.append(points.ravel())
    if not polygons:
        if annotation.get("iscrowd"):
            report.add("crowd regions without a segmentation, for which their box stands", _named(annotation))
        elif isinstance(found, list):
            annotation["iscrowd"] = 1  # an object whose mask nobody knows
            report.add("objects without a polygon of three points, ignored as crowd regions are", _named(annotation))
        else:
            raise _Fault(NO_MASK, reprlib.repr(found))
        x, y, w, h = annotation["bbox"]
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return rle.merge(rle.frPyObjects(polygons, *size[::-1]))


def _given(found: dict[str, Any], size: tuple[int, int]) -> bytes:
    """Compressed run lengths that were given, or given uncompressed; `pixel_sums` has yet to see them."""
    shape, counts = found.get("size"), found.get("counts")
    if not (isinstance(shape, list | tuple) and len(shape) == 2 and isinstance(counts, str | bytes | list)):
        raise _Fault(MALFORMED, reprlib.repr(found))
    if tuple(shape) != size[::-1]:
        raise _Fault(OTHER_SIZE, f"{shape[1]} x {shape[0]} in {size[0]} x {size[1]}")
    if isinstance(counts, list):
        lengths = _numbers(counts)
        if lengths is None or (lengths < 0).any() or (lengths > MOST_PIXELS).any() or (lengths % 1 != 0).any():
            raise _Fault(DAMAGED, reprlib.repr(counts))
        if lengths.sum() != size[0] * size[1]:
            raise _Fault(OTHER_SIZE, f"{lengths.sum():.0f} pixels in {size[0]} x {size[1]}")
        return rle.frPyObjects({"size": shape, "counts": lengths}, *shape)["counts"]
    return counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts


def _numbers(values: list) -> np.ndarray | None:
    """[N], or None for anything but a list of numbers."""
    try:
        array = np.array(values)
    except ValueError:
        return None
    return array if array.ndim == 1 and array.dtype.kind in "iuf" else None


def _outline(points: np.ndarray) -> float:
    """The steps from pixel to pixel along a closed polygon [P, 2]."""
    return np.abs(points - np.roll(points, 1, 0)).max(1).sum()


def cut_polygon(points: np.ndarray, least: float, most: np.ndarray) -> np.ndarray:
    """[P, 2] -> [Q, 2]: what is outside ``least`` to ``most`` (x, y) moves onto their border, the rest stays."""
    along = np.roll(points, -1, 0) - points
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.concatenate([(least - points) / along, (most - points) / along], 1)
    crossed = (crossings > 0) & (crossings < 1)
    steps = np.pad(np.sort(np.where(crossed, crossings, 2), 1), ((0, 0), (1, 0)))  # [P, 5], 0 is the vertex itself
    return (points[:, None] + steps[..., None] * along[:, None])[steps < 1].clip(least, most)


def pixel_sums(encoded: Sequence[bytes]) -> np.ndarray:
    """[N] int64: the pixels that compressed run lengths stand for; -1 where they are damaged.

    A number is written in characters from "0" on with 5 bits each, the lowest first. Bit 5 says that more follow, bit 4
    of the last that it is negative. The fourth number and all after it are differences to the number two before.
    """
    whole = np.array([not text or text[-1] - 48 < 32 for text in encoded], dtype=bool)
    texts = [text if text and ends else b"0" for text, ends in zip(encoded, whole, strict=True)]
    characters = np.array([len(text) for text in texts])
    starts = np.cumsum(characters) - characters  # [N] in characters
    codes = np.frombuffer(b"".join(texts), dtype=np.uint8) - np.uint8(48)
    ends = np.flatnonzero(codes & 32 == 0)  # [M] of the numbers of all texts
    begins = np.append(0, ends[:-1] + 1)
    digits = ends - begins + 1
    lengths = np.where(codes[ends] & 16, -1 << 5 * digits.clip(max=MOST_DIGITS), 0)  # [M]
    longer = slice(None)
    for place in range(MOST_DIGITS):
        lengths[longer] += (codes[begins[longer] + place] & 31).astype(np.int64) << 5 * place
        longer = np.flatnonzero(digits > place + 1)
    firsts = np.searchsorted(begins, starts)  # [N] in numbers
    index = np.arange(len(lengths)) - np.repeat(firsts, np.diff(firsts, append=len(lengths)))
    for parity in (1, 0):
        chain = np.flatnonzero((index > 0) & (index % 2 == parity))
        sums, heads = np.cumsum(lengths[chain]), np.flatnonzero(index[chain] <= 2)
        before = sums[heads] - lengths[chain[heads]]
        lengths[chain] = sums - np.repeat(before, np.diff(heads, append=len(chain)))
    damaged = ~whole | (np.maximum.reduceat(codes, starts) > 63) | (np.minimum.reduceat(lengths, firsts) < 0)
    damaged |= np.maximum.reduceat(digits, firsts) > MOST_DIGITS
    return np.where(damaged, -1, np.add.reduceat(lengths, firsts))
