"""What happens to an image and its boxes before the model: resize, crop, flip, normalise.

The multi-scale and crop augmentation is DETR's (Carion et al. 2020, arXiv 2005.12872, section 4). Every
random choice is drawn from the generator that the caller passes, so that neither workers nor resuming
change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MEAN = 255.0 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
_SCALE = 1.0 / (255.0 * torch.tensor(IMAGENET_STD).view(3, 1, 1))


@dataclass(frozen=True)
class TransformConfig:
    """How images are augmented and sized. The defaults are DETR's for COCO.

    flip         probability of a horizontal mirror image
    scales       lengths of the shorter side to draw from in training
    max_size     the longer side is at most this, in training and evaluation
    crop         probability of the branch that resizes, crops and resizes again
    crop_scales  lengths of the shorter side before the crop
    crop_size    (least, most) width and height of the crop, smaller where the image is
    eval_scale   length of the shorter side in evaluation
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    flip: float = 0.5
    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    max_size: int = 1333
    crop: float = 0.5
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_size: tuple[int, ...] = (384, 600)
    eval_scale: int = 800

    def __post_init__(self) -> None:
        for name in ("flip", "crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability in 0..1, got {getattr(self, name)!r}")
        for name in ("scales", "crop_scales"):
            lengths = getattr(self, name)
            if not lengths or min(lengths) < 1:
                raise ValueError(f"{name}: expected one or more positive lengths in pixels, got {lengths!r}")
        for name in ("max_size", "eval_scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive length in pixels, got {getattr(self, name)!r}")
        if len(self.crop_size) != 2 or not 1 <= self.crop_size[0] <= self.crop_size[1]:
            raise ValueError(f"crop_size: expected (least, most) with 1 <= least <= most, got {self.crop_size!r}")

    @classmethod
    def single_scale(cls, scale: int, flip: float = 0.5) -> TransformConfig:
        """One scale for training and evaluation and no crop: images of that scale stay as they are."""
        return cls(flip=flip, scales=(scale,), max_size=scale * 1333 // 800, crop=0.0, eval_scale=scale)


@dataclass(frozen=True)
class Scene:
    """An image on its way through the transforms.

    image   PIL image, mode RGB
    boxes   [T, 4] float64, (x0, y0, x1, y1) in pixels, inside the image
    labels  [T] int64
    """

    image: Image.Image
    boxes: np.ndarray
    labels: np.ndarray


Transform = Callable[[Scene, np.random.Generator], Scene]


def resized_shape(width: int, height: int, shorter: int, max_size: int) -> tuple[int, int]:
    """(width, height) of the same aspect ratio: the shorter side ``shorter``, unless the longer would pass
    ``max_size``."""
    scale = min(shorter / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize(scene: Scene, shape: tuple[int, int]) -> Scene:
    """The image at ``shape`` = (width, height), by bilinear interpolation with antialiasing."""
    width, height = scene.image.size
    if shape == (width, height):
        return scene
    scale = np.array([shape[0] / width, shape[1] / height] * 2)
    return Scene(scene.image.resize(shape, Image.Resampling.BILINEAR), scene.boxes * scale, scene.labels)


def crop(scene: Scene, left: int, top: int, width: int, height: int) -> Scene:
    """The window of the scene. Boxes are clipped to it; those left without area are dropped."""
    boxes = scene.boxes - np.array([left, top, left, top], dtype=np.float64)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float64))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    image = scene.image.crop((left, top, left + width, top + height))
    return Scene(image, boxes[kept], scene.labels[kept])


def mirror(scene: Scene) -> Scene:
    """The image with left and right exchanged."""
    x0, y0, x1, y1 = scene.boxes.T
    boxes = np.stack([scene.image.width - x1, y0, scene.image.width - x0, y1], axis=1)
    return Scene(scene.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), boxes, scene.labels)


def _random_resize(scene: Scene, lengths: tuple[int, ...], max_size: int, rng: np.random.Generator) -> Scene:
    return resize(scene, resized_shape(*scene.image.size, lengths[rng.integers(len(lengths))], max_size))


def _random_crop(scene: Scene, least: int, most: int, rng: np.random.Generator) -> Scene:
    width, height = (int(rng.integers(min(least, side), min(most, side) + 1)) for side in scene.image.size)
    left = int(rng.integers(scene.image.width - width + 1))
    top = int(rng.integers(scene.image.height - height + 1))
    return crop(scene, left, top, width, height)


def _augment(scene: Scene, rng: np.random.Generator, *, config: TransformConfig) -> Scene:
    if rng.uniform() < config.flip:
        scene = mirror(scene)
    if rng.uniform() < config.crop:
        scene = _random_resize(scene, config.crop_scales, config.max_size, rng)
        scene = _random_crop(scene, *config.crop_size, rng)
    return _random_resize(scene, config.scales, config.max_size, rng)


def _resize_for_evaluation(scene: Scene, rng: np.random.Generator, *, config: TransformConfig) -> Scene:
    return resize(scene, resized_shape(*scene.image.size, config.eval_scale, config.max_size))


def train_transforms(config: TransformConfig) -> Transform:
    """DETR's augmentation: mirror; then a random scale, directly or after a random crop at another scale."""
    return partial(_augment, config=config)


def eval_transforms(config: TransformConfig) -> Transform:
    """Resizes to ``eval_scale``; draws nothing."""
    return partial(_resize_for_evaluation, config=config)


def normalised(image: Image.Image) -> Tensor:
    """[3, h, w] float32 of an RGB image, with ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).sub_(_MEAN).mul_(_SCALE)


def normalised_boxes(boxes: np.ndarray, width: int, height: int) -> Tensor:
    """[T, 4] float32 (cx, cy, w, h) as fractions of the image, from [T, 4] (x0, y0, x1, y1) in pixels."""
    corners = boxes / np.array([width, height, width, height], dtype=np.float64)
    centres, extents = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return torch.from_numpy(np.concatenate([centres, extents], axis=1).astype(np.float32))
