"""What the model is fed: `Target`, `Batch`, and `collate`, which makes a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from route_detr.data.transforms import normalised


@dataclass
class Target:
    """The objects of one image.

    image_id       the image's id in its COCO file
    boxes          [T, 4] float32, (cx, cy, w, h) as fractions of the transformed image without its padding
    labels         [T] int64, contiguous from 0
    size           (height, width) after the transforms, without padding
    original_size  (height, width) of the image in the frame in which its annotations are given
    masks          [T, *size] bool, or None where the data set was opened without masks
    """

    image_id: int
    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]
    original_size: tuple[int, int]
    masks: Tensor | None = None


@dataclass
class Batch:
    """Images of one step, padded at the right and the bottom.

    pixels        [B, 3, Hmax, Wmax] uint8
    padding_mask  [B, Hmax, Wmax] bool, True where there is padding; None where there is none in the whole batch
    targets       one `Target` an image
    """

    pixels: Tensor
    padding_mask: Tensor | None
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def images(self) -> Tensor:
        """[B, 3, Hmax, Wmax] float32, with ImageNet's mean and standard deviation taken out, 0 in the padding."""
        images = normalised(self.pixels)
        return images if self.padding_mask is None else images.masked_fill(self.padding_mask[:, None], 0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Moves what is large. Boxes and labels stay: the criterion checks them on the host and copies them once."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Called by ``DataLoader(pin_memory=True)``."""
        return self._each(Tensor.pin_memory)

    def _each(self, moved: Callable[[Tensor], Tensor]) -> Batch:
        targets = [t if t.masks is None else replace(t, masks=moved(t.masks)) for t in self.targets]
        padding_mask = None if self.padding_mask is None else moved(self.padding_mask)
        return Batch(moved(self.pixels), padding_mask, targets)


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pads pixels ``[3, h, w]`` to the largest height and width among them. Raises ValueError when empty."""
    if not samples:
        raise ValueError("collate: expected at least one sample, got none")
    pixels, targets = [list(column) for column in zip(*samples, strict=True)]
    if len({image.shape for image in pixels}) == 1:
        return Batch(torch.stack(pixels), None, targets)
    height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
    padded = pixels[0].new_zeros(len(pixels), 3, height, width)
    padding_mask = torch.ones(len(pixels), height, width, dtype=torch.bool)
    for row, image in enumerate(pixels):
        padded[row, :, : image.shape[1], : image.shape[2]] = image
        padding_mask[row, : image.shape[1], : image.shape[2]] = False
    return Batch(padded, padding_mask, targets)
