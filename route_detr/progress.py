"""How far a run is, and the learning rate that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from route_detr.config import TrainConfig


@dataclass
class Progress:
    """The part of a run's state that is neither weights nor optimizer, alike on all ranks."""

    epoch: int = 0  # finished epochs, each with its evaluation
    step_in_epoch: int = 0
    step: int = 0
    skipped: int = 0  # of these steps, those whose float16 gradients overflowed
    skipped_in_a_row: int = 0  # the latest of them
    elapsed: float = 0.0  # seconds of training and evaluation, over all resumptions
    metrics: dict[str, float | None] = field(default_factory=dict)  # of the latest evaluation
    best: dict[str, float | None] = field(default_factory=dict)  # of the best one, with its "epoch"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def count_step(self, seconds: float, skipped: bool = False) -> None:
        self.step += 1
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        self.step_in_epoch += 1
        self.elapsed += seconds

    def finish_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0

    def out_of_time(self, config: TrainConfig) -> bool:
        return config.time_budget is not None and self.elapsed >= config.time_budget

    def fraction(self, steps_per_epoch: int, config: TrainConfig) -> float:
        """Share of the run that is done: by steps, or by seconds where a time budget will end it sooner."""
        by_steps = self.step / (config.epochs * steps_per_epoch)
        return by_steps if config.time_budget is None else max(by_steps, self.elapsed / config.time_budget)

    def learning_rate_factor(self, steps_per_epoch: int, config: TrainConfig) -> float:
        """Linear warm-up over ``warmup_steps``, then 1, and 0.1 from ``drop_at`` (a share of the run) on."""
        warmup = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        return warmup * (0.1 if self.fraction(steps_per_epoch, config) >= config.drop_at else 1.0)


class LossSums:
    """Sums of an epoch's losses, on the device until they are read.

    ``reduce`` averages a tensor over the ranks. The names change when the branches fork.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], before: dict[str, float] | None = None) -> None:
        self.reduce, self.before = reduce, before or {}
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(0)

    def add(self, names: tuple[str, ...], values: Tensor) -> None:
        """values: [len(names)]."""
        if names != self.names:
            self.before, self.names = self.read(), names
            start = [self.before.pop(name, 0.0) for name in names]
            self.sums = torch.tensor(start, dtype=torch.float64, device=values.device)
        self.sums = self.sums + values

    def read(self) -> dict[str, float]:
        """Waits for the device and, with several ranks, for all of them."""
        if not self.names:
            return dict(self.before)
        return self.before | dict(zip(self.names, self.reduce(self.sums).tolist(), strict=True))
