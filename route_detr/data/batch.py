"""What the model is fed: ``Target``, ``Batch``, and ``collate``, which pads images to one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Target:
    """The objects of one image.

    image_id       the image's id in its COCO file
    boxes          [T, 4] float32, (cx, cy, w, h) as fractions of the transformed image without its padding
    labels         [T] int64, contiguous from 0
    size           (height, width) after the transforms, without padding
    original_size  (height, width) of the image in the frame in which its annotations are given
    """

    image_id: int
    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]
    original_size: tuple[int, int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return replace(
            self,
            boxes=self.boxes.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Target:
        return replace(self, boxes=self.boxes.pin_memory(), labels=self.labels.pin_memory())


@dataclass
class Batch:
    """Images of one step, padded with zeros at the right and the bottom.

    images        [B, 3, Hmax, Wmax] float32, normalised with ImageNet's mean and standard deviation
    padding_mask  [B, Hmax, Wmax] bool, True where there is padding; None where there is none in the whole batch
    targets       one ``Target`` an image
    """

    images: Tensor
    padding_mask: Tensor | None
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            None if self.padding_mask is None else self.padding_mask.to(device, non_blocking=non_blocking),
            [target.to(device, non_blocking) for target in self.targets],
        )

    def pin_memory(self) -> Batch:
        """Called by ``DataLoader(pin_memory=True)``."""
        padding_mask = None if self.padding_mask is None else self.padding_mask.pin_memory()
        return Batch(self.images.pin_memory(), padding_mask, [t.pin_memory() for t in self.targets])


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pads images ``[3, h, w]`` to the largest height and width among them. Raises ValueError when empty."""
    if not samples:
        raise ValueError("collate: expected at least one sample, got none")
    images, targets = [list(column) for column in zip(*samples, strict=True)]
    heights, widths = [image.shape[1] for image in images], [image.shape[2] for image in images]
    height, width = max(heights), max(widths)
    if min(heights) == height and min(widths) == width:
        return Batch(torch.stack(images), None, targets)
    padded = images[0].new_zeros(len(images), 3, height, width)
    padding_mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for row, image in enumerate(images):
        padded[row, :, : heights[row], : widths[row]] = image
        padding_mask[row, : heights[row], : widths[row]] = False
    return Batch(padded, padding_mask, targets)
