"""Reading image files as 8-bit RGB, whatever they are stored as."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.Image import Transpose

from route_detr.data.report import DatasetError, Report
from route_detr.files import write_atomically, writing

ORIENTATION_TAG, TIFF_WIDTH, TIFF_HEIGHT = 0x0112, 0x0100, 0x0101
UPRIGHT = {  # what turns a stored image upright, by its orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
AS_STORED = UPRIGHT | {6: Transpose.ROTATE_90, 8: Transpose.ROTATE_270}  # what turns it back
CACHE_VERSION = 1  # to be raised when `read_rgb` makes other pixels of a file
FOLDER_IGNORED = "names of images whose folder is not there, found without it"
EXIF_IGNORED = "EXIF blocks that cannot be read, ignored"
FRAME_UNKNOWN = (
    "images whose EXIF orientation is applied because their size does not tell whether their annotations want it, "
    "though those of others are for the image as stored"
)
NOT_PIXELS = ("EPS", "MPEG")  # Pillow knows their size, and cannot read them by itself


class Opened(NamedTuple):
    """An image file whose header has been read.

    image        its pixels not yet read
    stored       (width, height) as stored
    orientation  1 to 8, as EXIF counts
    exif_fault   why its EXIF block cannot be read, and is ignored
    """

    image: Image.Image
    stored: tuple[int, int]
    orientation: int = 1
    exif_fault: str | None = None

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) with the orientation applied."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    def frame(self, size: tuple[int, int]) -> str:
        """Where annotations of `size` = (width, height) were made: "upright", "stored", or "either" where the size
        does not tell."""
        if self.orientation == 1 or self.stored != self.upright:
            return "upright" if size == self.upright else "stored"
        return "either"


@contextlib.contextmanager
def opened(path: str | os.PathLike, size: tuple[int, int] | None = None) -> Iterator[Opened]:
    """The header of an image file.

    Raises DatasetError naming the file, from inside the context too, when it is missing, truncated, no image of 8 or 16
    bits a channel, or not of `size` = (width, height) either as it is stored or with its EXIF orientation.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata, one an image
            with Image.open(path) as image:
                found = _header(image, size)
                _check(found, size)
                yield found
    except Exception as error:  # a damaged file can fail anywhere inside its decoder
        told = isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError) and str(error)
        reason = getattr(error, "strerror", None) or told or repr(error)
        raise DatasetError(f"{os.fspath(path)}: cannot be used as an image: {reason}") from error


def _header(image: Image.Image, size: tuple[int, int] | None) -> Opened:
    # Pillow opens a TIFF with the size that it has upright, and turns it while it reads the pixels.
    stored = (image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]) if image.format == "TIFF" else image.size
    if image.format == "PNG" and size == stored and "exif" not in image.info:
        return Opened(image, stored)  # PNG allows the block behind the pixels; Pillow would read all of them for it
    try:
        exif = image.getexif()
        if not exif:
            Image.Exif().load(image.info.get("exif", b""))  # raises what Pillow kept to itself when it opened a JPEG
        orientation = exif.get(ORIENTATION_TAG)
    except Exception as error:  # anything may be in it
        return Opened(image, stored, exif_fault=str(error) or repr(error))
    return Opened(image, stored, orientation if orientation in UPRIGHT else 1)


def _check(found: Opened, size: tuple[int, int] | None) -> None:
    image = found.image
    if image.format in NOT_PIXELS or isinstance(image, ImageFile.StubImageFile):
        raise ValueError(f"{image.format} is no format of pixels")
    if image.mode == "F":
        raise ValueError("a floating-point image has no defined range; save it with 8 or 16 bits a channel")
    if image.mode == "LAB":
        raise ValueError("colours in L*a*b*; save it as RGB")
    if size not in (None, found.stored, found.upright):
        stored = f"{found.stored[0]} x {found.stored[1]}"
        turned = f" ({found.upright[0]} x {found.upright[1]} with its EXIF orientation)"
        raise ValueError(
            f"expected the annotation file's {size[0]} x {size[1]} pixels, the image has {stored}"
            f"{turned * (found.upright != found.stored)}"
        )


def image_file(folder: Path, name: str) -> Path:
    """The file that a ``file_name`` means: in the folder, above it (``../``) or anywhere (an absolute name).

    A backslash is a separator, as Windows writes it, unless a file has it in its name. Where the folder of a name is
    not there, as in ``images/0001.jpg`` below ``images``, the file is looked for without it.
    """
    file = folder / name  # os.path's functions: a name that no file can have is one that is not there
    if "\\" in name and not os.path.exists(file):
        file = folder / name.replace("\\", "/")
    bare = folder / file.name
    return bare if os.path.isfile(bare) and not os.path.exists(file.parent) else file


def image_files(folder: Path, names: Sequence[str], report: Report) -> list[Path]:
    """`image_file` of each name. Counts those found without their folder; one so found for two names is neither's."""
    files = [image_file(folder, name) for name in names]
    times = Counter(files)
    for number, (name, file) in enumerate(zip(names, files, strict=True)):
        if file not in (folder / name, folder / name.replace("\\", "/")):
            if times[file] > 1:
                files[number] = folder / name
            else:
                report.add(FOLDER_IGNORED, f"{name}: {file}")
    return files


def read_rgb(path: str | os.PathLike, size: tuple[int, int] | None = None) -> Image.Image:
    """The file as an RGB image in the frame of annotations of `size` = (width, height); the first of several frames.

    An EXIF orientation is applied whenever that gives `size`, or where none is given: most labelling tools show the
    rotated image. It is not when only the stored size is `size`: then the annotations were made, as with COCO's own
    tools, on the stored pixels. An EXIF block that cannot be read is ignored. 16-bit greyscale is scaled by 1/257, what
    is transparent is laid over white. Raises DatasetError as `opened` does.
    """
    with opened(path, size) as found:
        image, turned = found.image, found.image.format == "TIFF"
        image.load()
        if image.format == "PNG":  # all of it is known only now
            found = _header(image, None)
        upright = size in (None, found.upright)
        turn = (UPRIGHT if upright else AS_STORED).get(found.orientation) if upright != turned else None
        if size is None:
            size = found.upright
        if image.mode.startswith("I"):
            levels = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
            image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        image = image.convert("RGB")
        image = image if turn is None else image.transpose(turn)
        if image.size != size:
            raise ValueError(
                f"its header says {size[0]} x {size[1]} pixels, its content {image.width} x {image.height}"
            )
        return image


class Verdict(NamedTuple):
    """An image file's `Opened.frame` and `Opened.exif_fault`, or why it cannot be used."""

    frame: str | None = None
    exif_fault: str | None = None
    fault: str | None = None


def judged(path: str | os.PathLike, size: tuple[int, int], whole: bool = False) -> Verdict:
    """Whether a file's header fits annotations of `size` = (width, height); with `whole`, whether all can be read."""
    try:
        with opened(path, size) as found:
            verdict = Verdict(found.frame(size), found.exif_fault)
        if whole:
            read_rgb(path, size)
        return verdict
    except DatasetError as error:
        return Verdict(fault=str(error))


def note_verdicts(files: Iterable[str], verdicts: Iterable[Verdict], faults: Report, report: Report) -> None:
    """Adds what makes a data set's files unfit for training to ``faults``, what is done about others to ``report``."""
    frames = Report()
    for file, verdict in zip(files, verdicts, strict=True):
        if verdict.fault:
            faults.add("image files that cannot be used", verdict.fault)
        else:
            frames.add(verdict.frame, file)
        if verdict.exif_fault:
            report.add(EXIF_IGNORED, f"{file}: {verdict.exif_fault}")
    if "stored" in frames and "either" in frames:
        report[FRAME_UNKNOWN] = frames["either"]


def cached_rgb(path: str | os.PathLike, size: tuple[int, int], cache: Path) -> Image.Image:
    """`read_rgb`, from the folder ``cache`` where that holds what this very file became, else put there.

    The file's path, length and time of change and `size` decide; what is damaged in the folder is made anew. Raises
    DatasetError as `read_rgb` does, WriteError where nothing can be written.
    """
    try:
        source = os.stat(path)
    except OSError as error:
        raise DatasetError(f"{os.fspath(path)}: cannot be used as an image: {error.strerror}") from error
    made_of = (CACHE_VERSION, os.path.realpath(path), source.st_size, source.st_mtime_ns, size)
    key = hashlib.sha256(os.fsencode(repr(made_of))).hexdigest()
    file = cache / key[:2] / f"{key}.npy"
    with contextlib.suppress(Exception):  # missing, or damaged anywhere
        pixels = np.load(file, mmap_mode="r")
        if pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.uint8:
            return Image.fromarray(pixels)
    image = read_rgb(path, size)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda stream: np.save(stream, np.asarray(image)))
    return image
