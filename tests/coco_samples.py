"""A small COCO data set to break, for the tests of reading."""

import copy
import json

from PIL import Image

from route_detr.data.coco import CocoDetection
from route_detr.data.transforms import TransformConfig


def single_scale(scale, flip=0.5):
    """One scale for training and evaluation and no crop: images of that scale stay as they are."""
    return TransformConfig(flip=flip, scales=(scale,), max_size=scale * 1333 // 800, crop=0.0, eval_scale=scale)


AS_STORED = single_scale(40)


def annotation(number=1, image=1, category=5, bbox=(10, 10, 20, 10), **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


def content(**changes):
    """Two 60 x 40 images, the second without boxes, and the categories 90 and 5."""
    sections = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 2, "file_name": "b.png", "width": 60, "height": 40},
        ],
        "annotations": [annotation(1), annotation(2, category=90, bbox=[0, 0, 60, 40])],
        "categories": [{"id": 90, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    return {**copy.deepcopy(sections), **changes}


def with_two_images(tmp_path):
    """The folder, with the image files that ``content()`` names."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), (10, 20, 30)).save(tmp_path / "images" / name)
    return tmp_path


def opened(folder, sections=None, config=AS_STORED, **options):
    text = sections if isinstance(sections, str | bytes) else json.dumps(content() if sections is None else sections)
    path = folder / "instances.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CocoDetection(path, folder / "images", config, **options)
