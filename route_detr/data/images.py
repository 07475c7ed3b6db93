"""Reading image files as 8-bit RGB, whatever they are stored as."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from route_detr.data.report import DatasetError

ORIENTATION_TAG = 0x0112
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    Image.DecompressionBombError,
)


@contextlib.contextmanager
def _reading(path: str | os.PathLike) -> Iterator[None]:
    """Turns whatever a decoder raises for a bad file into a DatasetError that names the file."""
    try:
        yield
    except READ_ERRORS as error:
        raise DatasetError(f"{os.fspath(path)}: cannot be used as an image: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An RGB image of the same size.

    16-bit greyscale is scaled by 1/257, so that its full range is 0..255. What is transparent is laid over
    white.
    Raises ValueError for a mode without a defined range (``F``) or without a conversion.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in SIXTEEN_BIT_MODES:
        levels = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        return Image.fromarray(np.round(levels / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("a floating-point image has no defined range; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in the frame of its annotations, whose (width, height) is ``size``.

    An EXIF orientation is applied whenever that gives ``size``: most labelling tools show the rotated image.
    It is not applied when only the stored size is ``size``: then the annotations were made, as with COCO's
    own tools, on the stored pixels. A half turn, a mirror image or a square image fits both ways and is
    rotated. Raises ValueError when neither has that size.
    """
    rotated = exif_size(image)
    if rotated == size:
        return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION_TAG, 1) != 1 else image
    if image.size == size:
        return image
    stored = f"{image.width} x {image.height}"
    turned = "" if rotated == image.size else f" ({rotated[0]} x {rotated[1]} with its EXIF orientation)"
    raise ValueError(f"expected the annotation file's {size[0]} x {size[1]} pixels, the image has {stored}{turned}")


def exif_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation."""
    quarter_turn = image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if quarter_turn else image.size


def read_rgb(path: str | os.PathLike, size: tuple[int, int] | None = None) -> Image.Image:
    """The file as an upright RGB image.

    With ``size`` = (width, height) of the annotations, in their frame (see ``upright``); without, EXIF
    orientation applied. Raises DatasetError naming the file when it is missing, truncated, not an image, or
    of another size.
    """
    with _reading(path), Image.open(path) as image:
        image.load()
        return as_rgb(upright(image, exif_size(image) if size is None else size))


def check_header(path: str | os.PathLike, size: tuple[int, int]) -> None:
    """Reads the header only. Raises DatasetError when it is no image or not of ``size`` = (width, height)."""
    with _reading(path), Image.open(path) as image:
        if image.size != size:
            upright(image, size)


def header_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) of the upright image. Raises DatasetError when the file is no image."""
    with _reading(path), Image.open(path) as image:
        return exif_size(image)
