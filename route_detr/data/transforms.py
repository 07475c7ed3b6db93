"""Which part of an image the model sees, and at which size: multi-scale resizing, random crops, mirror images.

The augmentation is DETR's (arXiv 2005.12872, section 4): resize, or resize, crop and resize again. Either is one window
of the image at one size, so that pixels are resampled once.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Probability = Annotated[float, Field(ge=0, le=1)]
Lengths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TransformConfig:
    """How images are augmented and sized, in pixels. The defaults are DETR's for COCO."""

    flip: Probability = 0.5  # of a mirror image
    scales: Lengths = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # of the shorter side in training
    max_size: PositiveInt = 1333  # of the longer side, in training and evaluation
    crop: Probability = 0.5  # of the branch that resizes, crops and resizes again
    crop_scales: Lengths = (400, 500, 600)  # of the shorter side before the crop
    crop_size: tuple[PositiveInt, PositiveInt] = (384, 600)  # least and most width and height of the crop
    eval_scale: PositiveInt = 800  # of the shorter side in evaluation

    @model_validator(mode="after")
    def _ordered(self) -> TransformConfig:
        if self.crop_size[0] > self.crop_size[1]:
            raise ValueError(f"crop_size: expected (least, most) with least <= most, got {self.crop_size}")
        return self


class View(NamedTuple):
    """A window (x0, y0, x1, y1) of an image, in its pixels, seen at a size (width, height), mirrored or not."""

    window: tuple[float, float, float, float]
    size: tuple[int, int]
    mirrored: bool = False

    def image(self, image: Image.Image) -> Image.Image:
        """Bilinear, with antialiasing; an image that is seen as it is comes back itself."""
        if self.window != (0, 0, *image.size) or self.size != image.size:
            image = image.resize(self.size, Image.Resampling.BILINEAR, box=self.window)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """[T, 4] float64 (x0, y0, x1, y1) in pixels of the image -> in pixels of the view, cut at its border."""
        window, size = np.array(self.window), np.tile(np.array(self.size, dtype=np.float64), 2)
        seen = (boxes - np.tile(window[:2], 2)) * (size / np.tile(window[2:] - window[:2], 2))
        seen = np.clip(seen, 0, size)
        return (
            np.stack([size[0] - seen[:, 2], seen[:, 1], size[0] - seen[:, 0], seen[:, 3]], 1) if self.mirrored else seen
        )

    def masks(self, masks: np.ndarray) -> np.ndarray:
        """[H, W, T] of the image -> [T, h, w] of the view, by the nearest pixel."""
        x0, y0, x1, y1 = self.window
        columns, rows = (
            (start + (np.arange(count) + 0.5) * (stop - start) / count).astype(np.int64)
            for start, stop, count in ((x0, x1, self.size[0]), (y0, y1, self.size[1]))
        )
        columns = columns[::-1] if self.mirrored else columns
        return np.ascontiguousarray(masks.transpose(2, 0, 1)).take(columns, 2).take(rows, 1)


def resized_shape(width: float, height: float, shorter: int, max_size: int) -> tuple[int, int]:
    """(width, height) of the same aspect ratio: the shorter side `shorter`, unless the longer would pass `max_size`."""
    scale = min(shorter / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def train_view(size: tuple[int, int], config: TransformConfig, rng: np.random.Generator) -> View:
    """DETR's augmentation of an image of `size` = (width, height): mirror, perhaps crop, random scale."""
    (width, height), window = size, (0, 0, *size)
    mirrored = rng.uniform() < config.flip
    if rng.uniform() < config.crop:
        scaled = resized_shape(*size, config.crop_scales[rng.integers(len(config.crop_scales))], config.max_size)
        least, most = config.crop_size
        width, height = (int(rng.integers(min(least, side), min(most, side) + 1)) for side in scaled)
        left, top = (int(rng.integers(side - cut + 1)) for side, cut in zip(scaled, (width, height), strict=True))
        across, down = (side / seen for side, seen in zip(size, scaled, strict=True))
        window = (left * across, top * down, min((left + width) * across, size[0]), min((top + height) * down, size[1]))
    scale = config.scales[rng.integers(len(config.scales))]
    return View(window, resized_shape(width, height, scale, config.max_size), mirrored)


def eval_view(size: tuple[int, int], config: TransformConfig) -> View:
    """The whole image at `eval_scale`."""
    return View((0, 0, *size), resized_shape(*size, config.eval_scale, config.max_size))


def image_pixels(image: Image.Image) -> Tensor:
    """[3, h, w] uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalised(pixels: Tensor) -> Tensor:
    """[..., 3, h, w] uint8 -> float32 with ImageNet's mean and standard deviation, on the same device."""
    mean, std = (
        255 * torch.tensor(values)[:, None, None].to(pixels.device, non_blocking=True)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return pixels.to(torch.float32).sub_(mean).mul_(1 / std)


def normalised_boxes(boxes: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[T, 4] (x0, y0, x1, y1) in pixels of `size` = (width, height) -> float32 (cx, cy, w, h) as fractions."""
    corners = boxes / np.tile(np.array(size, dtype=np.float64), 2)
    centres, extents = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return torch.from_numpy(np.concatenate([centres, extents], axis=1).astype(np.float32))
