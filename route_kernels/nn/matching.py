"""Hungarian matching of predictions and targets, with tables no larger than an image's and few of their rows solved."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.matching_cost import matching_cost

TABLE_BYTES = 2**25
"""At most, of the costs that are on the device at a time, where no image has more."""


class BoxTargets(NamedTuple):
    """Boxes of a batch, packed: those of an image stand side by side, nothing is padded. T of all images."""

    boxes: Tensor  # [T, 4] (cx, cy, w, h)
    labels: Tensor  # [T] int64
    counts: Sequence[int]  # of each image; they sum to T

    @property
    def first(self) -> list[int]:
        """Where the boxes of each image begin."""
        return [0, *itertools.accumulate(self.counts)][:-1]


class Matches(NamedTuple):
    """Which target each of [B, G, N] predictions is matched with; every branch matches min(N, T_b) of image b."""

    target: Tensor  # [B, G, N] int64, index among the packed targets; -1: none
    query: Tensor  # [M] int64, of the pairs one by one: which prediction of its branch; by image, then branch
    own: Tensor  # [M] int64, which target of its image
    counts: list[int]  # pairs of a branch of each image


def pack_targets(targets: Sequence, device: torch.device, dtype: torch.dtype, num_classes: int) -> BoxTargets:
    """Targets (objects with `boxes` [T_b, 4] and `labels` [T_b]) of the images, on a device; one copy of each.

    Raises ValueError, naming image and row, for a label outside [0, num_classes) or a box that is not finite, where the
    host has them, and for targets on a device that is neither the host nor `device`.
    """
    for image, target in enumerate(targets):
        for name, tensor in (("boxes", target.boxes), ("labels", target.labels)):
            if tensor.device.type not in ("cpu", "meta") and tensor.device != device:
                expected = f"expected on the host or on {device}"
                raise ValueError(f"targets[{image}].{name}: {expected}, got one on {tensor.device}")
    if not targets:
        nothing = torch.empty(0, 4, dtype=dtype, device=device)
        return BoxTargets(nothing, nothing[:, 0].to(torch.int64), [])
    boxes, labels = torch.cat([each.boxes for each in targets]), torch.cat([each.labels for each in targets])
    packed = BoxTargets(boxes, labels, [len(each.labels) for each in targets])
    _expect_right_rows(packed, num_classes)
    return packed._replace(
        boxes=boxes.to(device, dtype, non_blocking=True), labels=labels.to(device, non_blocking=True)
    )


def _expect_right_rows(targets: BoxTargets, num_classes: int) -> None:
    """Looks at what the host has, without an operator of PyTorch."""
    wrong = {}
    if targets.labels.device.type == "cpu":
        labels = targets.labels.numpy()
        wrong["labels", f"a number from 0 to {num_classes - 1}"] = labels, (labels < 0) | (labels >= num_classes)
    if targets.boxes.device.type == "cpu":
        boxes = targets.boxes.detach().float().numpy()
        wrong["boxes", "finite numbers"] = boxes, ~np.isfinite(boxes).all(1)
    for (name, expected), (values, bad) in wrong.items():
        if bad.any():
            packed_row = int(bad.argmax())
            image = int(np.searchsorted(np.cumsum(targets.counts), packed_row, side="right"))
            row, got = packed_row - targets.first[image], values[packed_row].tolist()
            raise ValueError(f"targets[{image}].{name}[{row}]: expected {expected}, got {got}")


class _Table(NamedTuple):
    """Costs of some images on the host: all of them, or the k cheapest of each target and whose they are."""

    of_set: int
    images: range
    costs: Tensor  # [T of these images, G, N or k]
    predictions: Tensor | None  # [T of these images, G, k]


class HungarianMatcher:
    """Matches that minimise the sum of `matching_cost` over the pairs, for each image and branch.

    Exact, with a part of the table. For T targets and N >= T predictions let each target have a list of its cheapest
    predictions, which either has T entries or ends with one that no other list has. Then some optimal assignment takes
    every target's prediction from its own list. Proof: start from any optimal one. Give each target that is outside its
    list, where that ends with an entry of its own, this entry: nobody within his list has it, no two get the same, and
    it is no dearer, as all outside the list cost at least as much. Whoever is still outside has a list of T, of which
    the other T - 1 targets hold at most T - 1: he takes a free one, which is no dearer either. So lists start short and
    grow only while they share their entries, at most to the T cheapest; what crosses to the host is that much, and what
    is solved is the union of the lists.

    Costs are computed a few images at a time, one where an image has many, and go to the host's pinned memory while the
    next are computed. The only wait for the device is the one for all of them. SciPy solves in threads: it releases
    Python's lock meanwhile.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        class_cost: str = "focal",
    ) -> None:
        """Arguments of `matching_cost`; the defaults are Deformable DETR's."""
        self.weights = {"class_weight": class_weight, "l1_weight": l1_weight, "giou_weight": giou_weight}
        self.weights |= {"alpha": alpha, "gamma": gamma, "class_cost": class_cost}
        self.threads = ThreadPoolExecutor(os.cpu_count())

    @torch.no_grad()
    def __call__(
        self,
        sets: Sequence[tuple[Tensor, Tensor]],
        targets: BoxTargets,
        names: Sequence[Sequence[str]] | None = None,
        more: Sequence[Callable[[int], Tensor] | None] | None = None,
    ) -> list[Matches]:
        """Matches of each set.

        Args:
            sets: (logits [B, G, N, K], boxes [B, G, N, 4]) of each; a set of one class (K = 1) is class-agnostic.
            targets: packed, on the device of the sets.
            names: of each set's G branches, for errors.
            more: of each set, None or what adds to an image's costs: image -> [T_b, G, N].

        Raises FloatingPointError for a cost that is not finite, naming branch, image, target and prediction.
        """
        tables = [
            table
            for index, predictions in enumerate(sets)
            for table in self._tables(index, *predictions, targets, more[index] if more else None)
        ]
        self.wait(targets.boxes.device)
        problems = []
        for table in tables:
            counts = [targets.counts[image] for image in table.images]
            parts = [(None,) * len(counts)] if table.predictions is None else [table.predictions.split(counts)]
            for image, costs, of in zip(table.images, table.costs.split(counts), *parts, strict=True):
                for branch in range(costs.shape[1]):
                    key = (table.of_set, image, branch)
                    problems.append((key, costs[:, branch].numpy(), None if of is None else of[:, branch].numpy()))
        for (index, image, branch), costs, of in problems:
            if costs.size and costs.min() == -np.inf:
                target, place = np.unravel_index(costs.argmin(), costs.shape)
                name = names[index][branch] if names else f"set {index}, branch {branch}"
                query = place if of is None else of[target, place]
                raise FloatingPointError(
                    f"matching cost of {name}, image {image} is not finite (target {target}, prediction {query})"
                )
        solved = self.threads.map(lambda problem: assignment(*problem[1:]), problems)
        pairs = {key: found for (key, _, _), found in zip(problems, solved, strict=True)}
        return self._placed([boxes.shape[:3] for _, boxes in sets], pairs, targets)

    def _tables(
        self, index: int, logits: Tensor, boxes: Tensor, targets: BoxTargets, more: Callable[[int], Tensor] | None
    ) -> Iterator[_Table]:
        labels = targets.labels if logits.shape[-1] > 1 else torch.zeros_like(targets.labels)
        branches, queries = boxes.shape[1:3]
        most = 1 if more else TABLE_BYTES // max(1, 4 * branches * queries)
        for images in _runs(targets.counts, most):
            first, counts = targets.first[images.start], [targets.counts[image] for image in images]
            here, rows = slice(images.start, images.stop), slice(first, first + sum(counts))
            cost = matching_cost(logits[here], boxes[here], targets.boxes[rows], labels[rows], counts, **self.weights)
            if more is not None:
                cost += more(images.start)
            cheapest = max(counts)
            if 3 * cheapest > queries:
                yield _Table(index, images, self.on_host(cost), None)
            else:
                costs, predictions = cost.topk(cheapest, largest=False)
                yield _Table(index, images, self.on_host(costs), self.on_host(predictions))

    @staticmethod
    def on_host(x: Tensor) -> Tensor:
        """The tensor on the host: whole after `wait`."""
        if not x.is_cuda:
            return x.cpu()
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return pinned.copy_(x, non_blocking=True)

    @staticmethod
    def wait(device: torch.device) -> None:
        """The one wait for the device."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _placed(self, shapes: Sequence[torch.Size], pairs: dict, targets: BoxTargets) -> list[Matches]:
        """Pairs (own targets, predictions) of each set, image and branch -> matches on the device, in one copy."""
        device, first = targets.boxes.device, targets.first
        rows, start = [np.empty((4, 0), np.int64)], 0
        for index, (batch, branches, queries) in enumerate(shapes):
            for image, branch in itertools.product(range(batch), range(branches)):
                if (index, image, branch) in pairs:
                    own, query = pairs[index, image, branch]
                    place = start + (image * branches + branch) * queries + query
                    rows.append(np.stack([place, first[image] + own, query, own]))
            start += batch * branches * queries
        on_host = torch.from_numpy(np.concatenate(rows, 1))
        if device.type == "cuda":
            on_host = on_host.pin_memory()
        place, target, query, own = on_host.to(device, non_blocking=True)
        every = torch.full((start,), -1, dtype=torch.int64, device=device).index_put_((place,), target)
        matches, pair = [], 0
        for shape, of_set in zip(shapes, every.split([shape.numel() for shape in shapes]), strict=True):
            counts = [min(shape[2], count) for count in targets.counts]
            mine = slice(pair, pair + shape[1] * sum(counts))
            matches.append(Matches(of_set.view(shape), query[mine], own[mine], counts))
            pair = mine.stop
        return matches


def _runs(counts: Sequence[int], most: int) -> Iterator[range]:
    """Images one after the other that have `most` targets together, or one that has more; none that has none."""
    start, held = 0, 0
    for image, count in enumerate(counts):
        if held and held + count > most:
            yield range(start, image)
            start, held = image, 0
        if not held:
            start = image
        held += count
    if held:
        yield range(start, len(counts))


def assignment(costs: np.ndarray, predictions: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest pairs (target, prediction) of a table [T, N], or of each target's cheapest [T, k], ascending.

    predictions: [T, k] which they are; k is N or at least T.
    """
    from scipy.optimize import linear_sum_assignment

    if predictions is None or costs.size == 0:
        return linear_sum_assignment(costs)
    listed = np.arange(costs.shape[1]) < list_lengths(predictions)[:, None]
    columns, column = np.unique(predictions[listed], return_inverse=True)
    table = np.full((len(costs), len(columns)), np.inf, costs.dtype)
    table[listed.nonzero()[0], column] = costs[listed]
    target, chosen = linear_sum_assignment(table)
    return target, columns[chosen]


def list_lengths(predictions: np.ndarray) -> np.ndarray:
    """How many of its cheapest predictions [T, k] each target needs to list: to one of its own, or all k."""
    longest = predictions.shape[1]
    lengths = np.ones(len(predictions), np.int64)
    while True:
        lists = predictions[:, : lengths.max(initial=1)]
        listed = np.arange(lists.shape[1]) < lengths[:, None]
        alone = listed & (np.bincount(lists[listed])[np.where(listed, lists, lists[:, :1])] == 1)
        has_own = alone.any(1)
        if (has_own | (lengths == longest)).all():
            return np.where(has_own, alone.argmax(1) + 1, lengths)
        lengths = np.where(has_own, lengths, np.minimum(2 * lengths, longest))
