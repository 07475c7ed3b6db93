"""Images in every mode, with every EXIF orientation, become upright RGB in the frame of their boxes."""

import zlib

import numpy as np
import pytest
from coco_samples import annotation, content, opened, with_two_images
from PIL import Image

from route_detr.data.images import read_rgb
from route_detr.data.report import DatasetError, DatasetWarning

ORIENTATION = 0x0112


@pytest.fixture
def folder(tmp_path):
    return with_two_images(tmp_path)


def grey_levels(maximum, dtype):
    return np.linspace(0, maximum, 2400).reshape(40, 60).astype(dtype)


def transparent(mode):
    image = Image.new("RGBA", (60, 40), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (30, 0, 60, 40))
    return image.convert(mode) if mode != "P" else image.quantize(8)


STORED_AS = {
    "1": (lambda: Image.new("1", (60, 40), 1), "png", (255, 255, 255), (255, 255, 255)),
    "L": (lambda: Image.new("L", (60, 40), 77), "png", (77, 77, 77), (77, 77, 77)),
    "P": (lambda: Image.new("RGB", (60, 40), (9, 99, 200)).quantize(4), "png", (9, 99, 200), (9, 99, 200)),
    "CMYK": (lambda: Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "jpg", (254, 0, 0), (254, 0, 0)),
    "RGBA over white": (lambda: transparent("RGBA"), "png", (200, 0, 0), (255, 255, 255)),
    "LA over white": (lambda: transparent("LA"), "png", (60, 60, 60), (255, 255, 255)),
    "P over white": (lambda: transparent("P"), "png", (200, 0, 0), (255, 255, 255)),
    "16 bit": (lambda: Image.fromarray(grey_levels(65535, np.uint16)), "png", (0, 0, 0), (255, 255, 255)),
    "16 bit tiff": (
        lambda: Image.fromarray(grey_levels(65535, np.uint16)),
        "tif",
        (0, 0, 0),
        (255, 255, 255),
    ),
    "32 bit tiff": (lambda: Image.fromarray(grey_levels(65535, np.int32)), "tif", (0, 0, 0), (255, 255, 255)),
}


@pytest.mark.parametrize("name", STORED_AS)
def test_every_way_to_store_an_image_becomes_rgb(folder, name):
    make, extension, top_left, bottom_right = STORED_AS[name]
    make().save(folder / "images" / f"x.{extension}")
    sections = content()
    sections["images"][0]["file_name"] = f"x.{extension}"
    dataset = opened(folder, sections)
    image = dataset.raw_image(0)
    assert image.mode == "RGB" and image.size == (60, 40)
    found = np.array([image.getpixel((0, 0)), image.getpixel((59, 39))])
    assert np.abs(found - np.array([top_left, bottom_right])).max() <= 3
    assert dataset[0][0].shape == (3, 40, 60)


def test_sixteen_bit_greys_are_scaled_not_clipped(folder):
    Image.fromarray(grey_levels(65535, np.uint16)).save(folder / "images" / "a.png")
    image = np.asarray(read_rgb(folder / "images" / "a.png"))
    assert np.abs(image[:, :, 0] - grey_levels(255, np.float64)).max() <= 1


def test_a_floating_point_image_is_refused_with_the_reason(folder):
    Image.fromarray(np.ones((40, 60), dtype=np.float32)).save(folder / "images" / "f.tif")
    sections = content()
    sections["images"][0]["file_name"] = "f.tif"
    with pytest.raises(DatasetError, match=r"f\.tif.*no defined range"):
        opened(folder, sections)[0]


def save_with_orientation(path, orientation, size=(60, 40)):
    """A dark image, stored with a white mark in the top left quarter."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif, quality=95)


# After the orientation, the mark of the top left quarter is at (right?, bottom?).
MARK = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}


FORMATS = ["jpg", "png", "tif", "webp", "avif", "mpo"]


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("orientation", MARK)
def test_exif_orientation_is_applied_when_the_annotations_have_the_rotated_size(folder, orientation, extension):
    save_with_orientation(folder / "images" / f"x.{extension}", orientation)
    width, height = (40, 60) if orientation > 4 else (60, 40)
    entry = {"id": 1, "file_name": f"x.{extension}", "width": width, "height": height}
    dataset = opened(folder, content(images=[entry], annotations=[annotation(1)]))
    image = dataset.raw_image(0)
    assert image.size == (width, height)
    right, bottom = MARK[orientation]
    corners = {(x, y): image.getpixel((5 + x * (width - 10), 5 + y * (height - 10)))[0] for x in (0, 1) for y in (0, 1)}
    assert corners[right, bottom] > 200
    assert all(level < 60 for corner, level in corners.items() if corner != (right, bottom))
    assert dataset[0][1].original_size == (height, width)


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_orientation_is_ignored_when_the_annotations_have_the_stored_size(folder, orientation, extension):
    save_with_orientation(folder / "images" / f"x.{extension}", orientation)
    entry = {"id": 1, "file_name": f"x.{extension}", "width": 60, "height": 40}
    image = opened(folder, content(images=[entry], annotations=[annotation(1)])).raw_image(0)
    assert image.size == (60, 40)
    assert image.getpixel((5, 5))[0] > 200 and image.getpixel((55, 5))[0] < 60


@pytest.mark.parametrize("extension", FORMATS)
def test_a_square_image_with_a_quarter_turn_is_rotated(folder, extension):
    save_with_orientation(folder / "images" / f"x.{extension}", 6, size=(40, 40))
    entry = {"id": 1, "file_name": f"x.{extension}", "width": 40, "height": 40}
    image = opened(folder, content(images=[entry], annotations=[annotation(1)])).raw_image(0)
    assert image.getpixel((35, 5))[0] > 200 and image.getpixel((5, 5))[0] < 60
    np.testing.assert_array_equal(read_rgb(folder / "images" / f"x.{extension}"), image)


def test_orientations_that_the_size_does_not_tell_are_counted_where_others_are_annotated_as_stored(folder):
    entries = []
    for number, (orientation, size) in enumerate([(6, (60, 40)), (3, (60, 40)), (8, (40, 40)), (1, (60, 40))], start=1):
        save_with_orientation(folder / "images" / f"{number}.tif", orientation, size)
        entries.append({"id": number, "file_name": f"{number}.tif", "width": size[0], "height": size[1]})
    with pytest.warns(DatasetWarning, match="does not tell whether their annotations want it") as told:
        dataset = opened(folder, content(images=entries, annotations=[annotation(1)]))
    assert ": 2 (" in str(told[0].message) and len(dataset.report) == 1
    assert not opened(folder, content(images=entries[1:], annotations=[])).report


GARBAGE = (b"Exif\0\0b'Exif garbage'", b"Exif\0\0II*\0\x07", b"some text")


@pytest.mark.parametrize(
    ("extension", "block"),
    [(e, b) for e in ("png", "webp", "jpg") for b in GARBAGE if e != "jpg" or b.startswith(b"Exif")],
)
def test_an_exif_block_that_cannot_be_read_is_ignored_and_counted(folder, extension, block):
    Image.new("RGB", (60, 40), (9, 99, 200)).save(folder / "images" / f"x.{extension}", exif=block)
    sections = content()
    sections["images"][0]["file_name"] = f"x.{extension}"
    with pytest.warns(DatasetWarning, match=rf"EXIF blocks that cannot be read, ignored: 1 \(.*x\.{extension}"):
        dataset = opened(folder, sections)
    assert np.abs(np.array(dataset.raw_image(0).getpixel((30, 20))) - (9, 99, 200)).max() < 8
    assert dataset[0][0].shape == (3, 40, 60)
    assert read_rgb(folder / "images" / f"x.{extension}").size == (60, 40)


def png_with(path, name, block):
    """The PNG with a chunk behind its pixels, where a size that fits needs no look."""
    whole = path.read_bytes()
    chunk = name + block
    chunk = len(block).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(whole[:-12] + chunk + whole[-12:])


@pytest.mark.parametrize(("orientation", "size"), [(6, (60, 40)), (6, (40, 60)), (3, (60, 40)), (None, (60, 40))])
def test_an_exif_block_behind_the_pixels_counts_as_one_before_them(folder, orientation, size):
    path = folder / "images" / "x.png"
    save_with_orientation(path, 1)
    with Image.open(path) as image:
        image.save(path)  # without any
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    png_with(path, b"eXIf", b"rubbish" if orientation is None else exif.tobytes().removeprefix(b"Exif\0\0"))
    entry = {"id": 1, "file_name": "x.png", "width": size[0], "height": size[1]}
    image = opened(folder, content(images=[entry], annotations=[annotation(1)])).raw_image(0)
    assert image.size == size
    right, bottom = MARK[orientation] if orientation == 3 or size == (40, 60) else (0, 0)
    assert image.getpixel((5 + right * (size[0] - 10), 5 + bottom * (size[1] - 10)))[0] > 200


@pytest.mark.parametrize("name", ["x.eps", "x.h5", "x.mpg", "lab.tif", "float.tif", "bomb.png"])
def test_what_the_first_check_accepts_can_be_read(folder, name):
    """Pillow opens all of these and knows their size; it cannot read them, or not as RGB."""
    path = folder / "images" / name
    size = (60, 40)
    if name == "x.eps":
        Image.new("RGB", size).save(path)
    elif name == "x.h5":
        size = (1, 1)
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    elif name == "x.mpg":
        path.write_bytes(b"\0\0\1\xb3\x03\xc0\x28" + bytes(100))
    elif name == "bomb.png":
        size = (50_000, 50_000)
        Image.new("L", (1, 1)).save(path)
        whole = path.read_bytes()
        header = b"IHDR" + b"\0\0\xc3\x50" * 2 + whole[24:29]
        path.write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
    else:
        Image.new("LAB" if name == "lab.tif" else "F", size).save(path)
    entry = {"id": 1, "file_name": name, "width": size[0], "height": size[1]}
    with pytest.raises(DatasetError, match=rf"{name}: cannot be used as an image: ") as told:
        opened(folder, content(images=[entry], annotations=[]))
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tif", "avif"])
def test_the_first_of_several_frames_is_read(folder, extension):
    path = folder / "images" / f"x.{extension}"
    first, second = (Image.new("RGB", (60, 40), colour) for colour in ((9, 99, 200), (250, 0, 0)))
    first.save(path, save_all=True, append_images=[second])
    assert np.abs(np.array(read_rgb(path, (60, 40)).getpixel((30, 20))) - (9, 99, 200)).max() < 8


def test_a_size_that_fits_neither_frame_names_both(folder):
    save_with_orientation(folder / "images" / "x.jpg", 6)
    entry = {"id": 1, "file_name": "x.jpg", "width": 50, "height": 50}
    with pytest.raises(DatasetError, match=r"the image has 60 x 40 \(40 x 60 with its EXIF orientation\)"):
        opened(folder, content(images=[entry], annotations=[]))
