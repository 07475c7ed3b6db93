"""How far a run is, and the learning rate that follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from route_detr.config import TrainConfig


@dataclass
class Progress:
    """The part of a run's state that is neither weights nor optimizer. It goes into every checkpoint."""

    epoch: int = 0  # finished epochs, each with its evaluation
    step_in_epoch: int = 0
    step: int = 0
    elapsed: float = 0.0  # seconds of training and evaluation, over all resumptions
    loss_sums: dict[str, float] = field(default_factory=dict)  # over the steps of the epoch so far
    metrics: dict[str, float | None] = field(default_factory=dict)  # of the latest evaluation
    best: dict[str, float | None] = field(default_factory=dict)  # of the best one, with its "epoch"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def count_step(self, losses: dict[str, float], seconds: float) -> None:
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value
        self.step += 1
        self.step_in_epoch += 1
        self.elapsed += seconds

    def mean_losses(self) -> dict[str, float]:
        return {name: total / self.step_in_epoch for name, total in self.loss_sums.items()}

    def finish_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0
        self.loss_sums = {}

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
