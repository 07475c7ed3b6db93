"""A training run from its first step, or from any checkpoint, to its pictures."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from route_detr.checkpoint import load_checkpoint, random_state, restore_random_state
from route_detr.config import Config
from route_detr.criterion import Criterion
from route_detr.data import coco_layout, open_splits
from route_detr.detector import Detector, parameter_groups
from route_detr.engine import evaluate, train_one_epoch
from route_detr.errors import CheckpointError, Interrupted
from route_detr.plots import plot_curves
from route_detr.progress import Progress
from route_detr.run import Run

CURVES_EVERY_SECONDS = 30.0


class StopSignal:
    """Remembers SIGINT or SIGTERM so that a run stops between two steps. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signum

    @contextmanager
    def watched(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(each, self._remember) for each in signals]
        try:
            yield
        finally:
            for each, handler in zip(signals, previous, strict=True):
                signal.signal(each, handler)


class Training:
    """Everything a run holds in memory.

    ``data`` has the paths train_json, train_images, val_json and val_images; the data decide the number of classes.
    """

    def __init__(
        self, run: Run, config: Config, data: dict[str, str], device: torch.device, preset: str | None = None
    ) -> None:
        self.run, self.data, self.device, self.preset = run, data, device, preset
        self.train_set, self.val_set = open_splits(coco_layout(**data), config.transforms, config.train.seed)
        self.config = config = config.updated({"detector.num_classes": self.train_set.num_classes})
        torch.manual_seed(config.train.seed)
        self.detector = Detector(config.detector).to(device)
        self.criterion = Criterion(config.train)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.detector, config.train))
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.progress = Progress()
        self.stop = StopSignal()
        self.drawn = -math.inf  # when the curves were

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_set) / self.config.train.batch_size)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain containers."""
        return {
            "config": self.config.to_dict(),
            "preset": self.preset,
            "data": self.data,
            **self._data_identity(),
            "threads": torch.get_num_threads(),
            "model": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress.to_dict(),
            "random": random_state(),
        }

    def _data_identity(self) -> dict[str, Any]:
        categories = zip(self.train_set.category_ids, self.train_set.category_names, strict=True)
        return {
            "categories": [{"id": number, "name": name} for number, name in categories],
            "images": len(self.train_set),
        }

    def start(self) -> None:
        """Write the folder of a new run; from its first checkpoint on it can be resumed."""
        self.run.check_new()
        self.run.folder.mkdir(parents=True, exist_ok=True)
        self._write_config()
        self.run.save(self.state())

    def resume(self) -> None:
        """Go back to the run's last checkpoint, in memory and in its records."""
        self.run.check_resumable()
        state = load_checkpoint(self.run.last)
        for name, value in self._data_identity().items():
            if state.get(name) != value:
                raise CheckpointError(f"{self.run.last}: the training set's {name} have changed since the run began")
        try:
            self.detector.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
            restore_random_state(state["random"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.run.last}: does not fit this run: {error}") from error
        self.run.rewind(self.progress.epoch, self.progress.step)
        self._write_config()

    def _write_config(self) -> None:
        self.run.write_config({**self.config.to_dict(), "data": self.data, "threads": torch.get_num_threads()})

    def fit(self) -> None:
        """Train and evaluate until the last epoch is done or the time budget is spent.

        Raises:
            NonFiniteLoss: the last checkpoint stands.
            Interrupted: SIGINT or SIGTERM came; a checkpoint of this very step has been written.
        """
        progress, config = self.progress, self.config.train
        total = config.epochs * self.steps_per_epoch
        quiet = {"mininterval": 0.2 if sys.stderr.isatty() else 20.0, "dynamic_ncols": True}
        with self.stop.watched(), tqdm(total=total, initial=progress.step, unit="step", smoothing=0.05, **quiet) as bar:
            while not self.finished:
                bar.set_description(f"epoch {progress.epoch + 1}/{config.epochs}", refresh=False)
                self._finish_steps(bar)
                self._finish_epoch(bar)

    @property
    def finished(self) -> bool:
        at_epoch_end = self.progress.step_in_epoch == 0
        return at_epoch_end and (
            self.progress.epoch >= self.config.train.epochs or self.progress.out_of_time(self.config.train)
        )

    def _finish_steps(self, bar: tqdm) -> None:
        """The epoch's remaining steps; the last of them is followed by a checkpoint, before the evaluation."""
        progress, config = self.progress, self.config.train
        if progress.step_in_epoch == self.steps_per_epoch or progress.out_of_time(config):
            return
        steps = train_one_epoch(
            self.detector, self.criterion, self.optimizer, self.train_set, progress, self.config, self.device
        )
        for values in steps:
            if progress.step % config.log_every == 0:
                self.run.record(
                    {"kind": "step", "epoch": progress.epoch, "step": progress.step, **values}
                    | {"seconds": round(progress.elapsed, 3)}
                )
            ends = progress.step_in_epoch == self.steps_per_epoch or progress.out_of_time(config)
            if ends or self.stop.received or progress.step % config.checkpoint_every == 0:
                self.run.save(self.state())
            if config.time_budget:
                affordable = int(progress.step * config.time_budget / progress.elapsed)
                bar.total = min(config.epochs * self.steps_per_epoch, max(progress.step, affordable))
            bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['learning_rate']:.1e}", refresh=False)
            bar.update()
            self._stop_if_asked()

    def _finish_epoch(self, bar: tqdm) -> None:
        progress, config = self.progress, self.config.train
        started = perf_counter()
        last = progress.epoch + 1 >= config.epochs or progress.out_of_time(config)
        evaluated = last or (progress.epoch + 1) % config.eval_every == 0
        metrics: dict[str, float | None] = {}
        if evaluated:
            bar.set_description(f"epoch {progress.epoch + 1}/{config.epochs}, evaluating")
            metrics = evaluate(
                self.detector, self.val_set, config, self.device, after_batch=lambda images: self._stop_if_asked()
            )
        losses = progress.mean_losses()
        line = {"kind": "epoch", "epoch": progress.epoch, "step": progress.step, **losses, **metrics}
        best = evaluated and metrics["AP"] > progress.best.get("AP", -1.0)
        progress.elapsed += perf_counter() - started
        progress.finish_epoch()
        if evaluated:
            progress.metrics = {**metrics, "epoch": progress.epoch}
        if best:
            progress.best = progress.metrics
        self.run.record({**line, "seconds": round(progress.elapsed, 3)})
        self.run.save(self.state(), best=best)
        if evaluated and perf_counter() - self.drawn > CURVES_EVERY_SECONDS:
            plot_curves(self.run.records(), self.run.folder / "curves.png")
            self.drawn = perf_counter()
        scores = f"  AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}" if evaluated else ""
        bar.write(f"epoch {progress.epoch}/{config.epochs}  loss {losses['loss']:.3f}{scores}", file=sys.stderr)

    def _stop_if_asked(self) -> None:
        """Between steps and between evaluation batches: the checkpoint of the last step stands."""
        if self.stop.received:
            raise Interrupted(self.stop.received, self.progress.step)

    def summary(self) -> str:
        """Average precision of the latest and the best evaluation, in words."""
        latest, best = self.progress.metrics, self.progress.best
        return (
            f"main branch (plain self-attention): AP {latest['AP']:.3f}  AP50 {latest['AP50']:.3f} "
            f"after {latest['epoch']} epochs, {self.progress.step} steps, {self.progress.elapsed:.0f} s; "
            f"best AP {best['AP']:.3f}  AP50 {best['AP50']:.3f} (epoch {best['epoch']})"
        )
