"""Batches: what the model is fed, which images make one on which rank, and the workers that read them."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from route_detr.data.report import DatasetError
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


def shuffled(landscape: Sequence[bool], batch_size: int, generator: torch.Generator) -> list[int]:
    """A random order of images in which batches, cut one after another, have only wide or only high ones.

    Less of such a batch is padding. Images that fill no batch of either come last; those of one orientation are in the
    order of a plain permutation.
    """
    order: list[int] = []
    waiting: dict[bool, list[int]] = {True: [], False: []}
    for index in torch.randperm(len(landscape), generator=generator).tolist():
        group = waiting[bool(landscape[index])]
        group.append(index)
        if len(group) == batch_size:
            order += group
            group.clear()
    return order + waiting[True] + waiting[False]


def epoch_batches(landscape: Sequence[bool], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The global batches of an epoch, all of ``batch_size``: the last is filled up with the epoch's first images.

    A pure function of the images' orientations, seed and epoch, so that a resumed run can start inside it and any
    number of ranks divides it.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = shuffled(landscape, batch_size, generator)
    steps = math.ceil(len(order) / batch_size)
    filled = order * math.ceil(batch_size / len(order)) + order
    return [filled[start : start + batch_size] for start in range(0, steps * batch_size, batch_size)]


def micro_batches(batches: Sequence[list[int]], rank: int, ranks: int, pieces: int) -> list[list[int]]:
    """This rank's part of each global batch, in as many pieces as gradients are accumulated over.

    Raises:
        ValueError: the batch size is no multiple of ranks x accumulation steps.
    """
    size, shares = len(batches[0]), ranks * pieces
    if size % shares:
        raise ValueError(f"train.batch_size: expected a multiple of {shares} (processes x accumulation), got {size}")
    mine = range(rank * pieces, (rank + 1) * pieces)
    return [batch[share::shares] for batch in batches for share in mine]


def _leave_signals_to_the_parent(worker: int) -> None:
    for name in ("SIGINT", "SIGHUP"):  # a terminal sends them to the workers too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Told(Dataset):
    """The items of a data set, or why one cannot be had: PyTorch would add a worker's traceback to what is raised."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, Target] | Exception:
        try:
            return self.dataset[index]
        except (DatasetError, OSError) as error:
            return error


def _collated(samples: Sequence[tuple[Tensor, Target] | Exception]) -> Batch | Exception:
    return next((each for each in samples if isinstance(each, Exception)), None) or collate(samples)


def batch_loader(dataset: Dataset, batches: list[list[int]], workers: int) -> Iterator[Batch]:
    """Batches of these indices. Draws nothing from the global random number generator.

    Raises:
        DatasetError: an image cannot be read.
        WriteError: the cache cannot be written.
    """
    loader = DataLoader(
        _Told(dataset),
        batch_sampler=batches,
        collate_fn=_collated,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def killed_worker(error: RuntimeError) -> str | None:
    """The sentence for an error by which PyTorch tells that one of its workers is dead; None for any other error."""
    found = re.search(
        r"DataLoader worker \(pid\S* ([^)]*)\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)", str(error)
    )
    if found is None:
        return None
    if found[2] == "Bus error":
        why = "shared memory is full: enlarge /dev/shm (docker run --shm-size), or train.workers=0"
    else:
        why = "most often because memory ran out: use fewer train.workers"
    return (
        f"a process that reads images (pid {found[1]}) was killed{f' by signal: {found[2]}' if found[2] else ''}, {why}"
    )
