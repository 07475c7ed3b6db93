"""Reading image files as 8-bit RGB, whatever they are stored as."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from route_detr.data.report import DatasetError

ORIENTATION_TAG = 0x0112
READ_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, Image.DecompressionBombError)


@contextlib.contextmanager
def opened(path: str | os.PathLike, size: tuple[int, int] | None = None) -> Iterator[Image.Image]:
    """The image file, its pixels not yet read.

    Raises DatasetError naming the file, from inside the context too, when it is missing, truncated, no image, or not of
    `size` = (width, height) either as it is stored or with its EXIF orientation.
    """
    try:
        with Image.open(path) as image:
            if size not in (None, image.size) and size != (turned := _upright_size(image)):
                stored = f"{image.width} x {image.height}"
                note = "" if turned == image.size else f" ({turned[0]} x {turned[1]} with its EXIF orientation)"
                raise ValueError(
                    f"expected the annotation file's {size[0]} x {size[1]} pixels, the image has {stored}{note}"
                )
            yield image
    except READ_ERRORS as error:
        raise DatasetError(f"{os.fspath(path)}: cannot be used as an image: {error}") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    quarter_turn = image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if quarter_turn else image.size


def read_rgb(path: str | os.PathLike, size: tuple[int, int] | None = None) -> Image.Image:
    """The file as an RGB image in the frame of annotations of `size` = (width, height).

    An EXIF orientation is applied whenever that gives `size`, or where none is given: most labelling tools show the
    rotated image. It is not when only the stored size is `size`: then the annotations were made, as with COCO's own
    tools, on the stored pixels. 16-bit greyscale is scaled by 1/257, what is transparent is laid over white.
    Raises DatasetError as `opened` does, and for floating-point images.
    """
    with opened(path, size) as image:
        image.load()
        if size in (None, _upright_size(image)):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            levels = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
            image = Image.fromarray(np.round(levels / 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("a floating-point image has no defined range; save it with 8 or 16 bits a channel")
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return image.convert("RGB")
