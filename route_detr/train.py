"""A training run from its first step, or from any checkpoint, to its last evaluation."""

from __future__ import annotations

import hashlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from route_detr.config import Config, TrainConfig
from route_detr.data.batches import batch_loader, epoch_batches, killed_worker, micro_batches
from route_detr.data.coco import CocoDetection, coco_layout, open_splits
from route_detr.data.images import image_file
from route_detr.data.report import DatasetError
from route_detr.errors import CheckpointError, Interrupted, NonFiniteLoss, RunFailed, WriteError
from route_detr.evaluation import evaluate, in_words
from route_detr.model.criterion import Criterion
from route_detr.model.detector import Detector
from route_detr.model.schedule import routing_values
from route_detr.run import Run, load_checkpoint, not_finite
from route_detr.scale_out import (
    accumulation,
    average_gradients,
    is_lost_connection,
    load_model,
    load_optimizer,
    prepared,
    whole,
)

SKIPPED_AT_MOST = 40  # steps in a row: each halves the scale of float16 gradients, which begins at 2**16


@dataclass
class Progress:
    """The part of a run's state that is neither weights nor optimizer, alike on all ranks."""

    epoch: int = 0  # finished epochs, each with its evaluation
    step_in_epoch: int = 0
    step: int = 0
    skipped: int = 0  # of these steps, those whose float16 gradients overflowed
    skipped_in_a_row: int = 0  # the latest of them
    elapsed: float = 0.0  # seconds of training and evaluation, over all resumptions
    trained: float = 0.0  # those of training alone
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
        self.trained += seconds

    def done(self, steps_per_epoch: int, config: TrainConfig) -> bool:
        """Whether the run's last step has been made, by their number or by the time budget."""
        out_of_time = config.time_budget is not None and self.elapsed >= config.time_budget
        return out_of_time or self.step >= config.total_steps(steps_per_epoch)

    def fraction(self, steps_per_epoch: int, config: TrainConfig) -> float:
        """Share of the run that is done: by steps, or by seconds where a time budget will end it sooner."""
        by_steps = self.step / config.total_steps(steps_per_epoch)
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


class Step(NamedTuple):
    """The results of a training step, on the device until they are read."""

    number: int
    names: tuple[str, ...]
    values: Tensor  # [len(names)], this rank's share of the losses
    grad_norm: Tensor
    settings: dict[str, float]
    skipped: bool = False  # by the scaler of float16 gradients, which overflowed: the weights are as they were

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Losses, ``grad_norm`` (but of a step that was skipped), ``learning_rate``, ``routing_strength`` and
        ``aux_weight``; all ranks take part.

        Raises:
            NonFiniteLoss: names the parts of the loss that are not finite, or the gradient norm.
        """
        values = accelerator.reduce(torch.cat([self.values, self.grad_norm.reshape(1)]), "mean").tolist()
        return self._finite(values) | self.settings

    def check(self) -> None:
        """`read`'s error, from this rank's share alone."""
        self._finite([*self.values.tolist(), self.grad_norm.item()])

    def _finite(self, values: list[float]) -> dict[str, float]:
        named = dict(zip((*self.names, "grad_norm"), values, strict=True))
        if self.skipped:
            del named["grad_norm"]
        bad = ", ".join(f"{name} = {value}" for name, value in named.items() if not math.isfinite(value))
        if bad:
            raise NonFiniteLoss(f"the loss is not finite at step {self.number}: {bad}")
        return named


class StopSignal:
    """Remembers SIGINT, SIGTERM or SIGHUP so that a run stops between two steps. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received = 0

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    @contextmanager
    def watched(self) -> Iterator[None]:
        signals = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # the terminal has gone; Windows has none
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup asks
            signals.append(hangup)
        previous = [signal.signal(each, self._remember) for each in signals]
        try:
            yield
        finally:
            for each, handler in zip(signals, previous, strict=True):
                signal.signal(each, handler)


def digests(dataset: CocoDetection) -> dict[str, str]:
    """SHA-256 of a data set's annotation file, and of the names and sizes in bytes of its image files."""
    annotations, images = hashlib.sha256(), hashlib.sha256()
    with open(dataset.annotation_file, "rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            annotations.update(block)
    for name in dataset.file_names:
        images.update(f"{name}: {image_file(dataset.image_dir, name).stat().st_size}\n".encode())
    return {"annotations": annotations.hexdigest(), "images": images.hexdigest()}


def parameter_groups(detector: Detector, config: TrainConfig, weights_follow: bool = False) -> list[dict]:
    """Optimizer groups "main", "backbone" and "sampling" (layers that give sampling offsets), by learning rate.

    Raises ValueError for a backbone whose fixed layers would be random: `fine_tune` without `weights`, where no
    checkpoint follows.
    """
    backbone = detector.config.backbone
    if backbone.fine_tune and backbone.weights is None and not weights_follow:
        raise ValueError(
            "detector.backbone.weights: expected a model name or folder, since fine_tune fixes the stem and all norms, "
            "got None (or begin with a checkpoint by --init, or train from scratch with "
            "detector.backbone.fine_tune=false)"
        )
    scales = {"backbone": config.backbone_learning_rate_scale, "sampling": config.sampling_learning_rate_scale}
    groups: dict[str, list[nn.Parameter]] = {"main": [], "backbone": [], "sampling": []}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            kind = "backbone" if name.startswith("backbone.") else "sampling" if "sampling_offsets" in name else "main"
            groups[kind].append(parameter)
    fixed = {"weight_decay": config.weight_decay}
    return [
        {"name": kind, "params": parameters, "lr": config.learning_rate * scales.get(kind, 1.0), **fixed}
        for kind, parameters in groups.items()
        if parameters
    ]


class Training:
    """Everything a run holds in memory, on one of its ranks.

    ``data`` has the paths train_json, train_images, val_json and val_images; the data decide the number of classes.
    ``preset`` names a preset or a file, ``base`` is what that file says. ``cache`` is a folder for decoded training
    images. With ``weights_follow`` the caller loads a checkpoint next, so that no pretrained backbone is read.

    Raises ValueError for a detector that cannot be built, or batches that cannot be shared, before any data are read.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        data: dict[str, str],
        accelerator: Accelerator,
        preset: str | None = None,
        base: Config | None = None,
        cache: Path | None = None,
        weights_follow: bool = False,
    ) -> None:
        if not weights_follow:
            backbone = config.detector.backbone.self_contained()
            config = replace(config, detector=replace(config.detector, backbone=backbone))
        accelerator.gradient_accumulation_steps = accumulation(config.train.accumulate)
        shares = accelerator.num_processes, accelerator.gradient_accumulation_steps
        micro_batches([[0] * config.train.batch_size], 0, *shares)  # one that cannot be shared is told now
        weightless, pretrained = {"detector.backbone.weights": None}, config.detector.backbone.weights is not None
        with torch.device("meta"):
            parameter_groups(Detector(config.updated(weightless).detector), config.train, weights_follow or pretrained)
        self.run, self.data, self.accelerator, self.preset, self.base = run, data, accelerator, preset, base
        self.train_set, self.val_set = open_splits(
            coco_layout(**data), config.transforms, config.train.seed, masks=config.detector.masks, cache=cache
        )
        self.config = config = config.updated({"detector.num_classes": self.train_set.num_classes})
        torch.manual_seed(config.train.seed)
        built = config.updated(weightless) if weights_follow else config
        self.detector = Detector(built.detector).to(accelerator.device)
        self.criterion = Criterion(config.train)
        optimizer = torch.optim.AdamW(parameter_groups(self.detector, config.train, weights_follow))
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.shapes = {name: value.shape for name, value in self.detector.state_dict().items()}
        self.model, self.optimizer = prepared(accelerator, self.detector, optimizer, config.train)
        self.progress, self.sums = Progress(), self._loss_sums()
        self.stop = StopSignal()
        several = accelerator.num_processes > 1
        self.host_group = torch.distributed.new_group(backend="gloo") if several else None

    def fit(self, after_evaluation: Callable[[], object] = lambda: None) -> None:
        """Train and evaluate until the last step is done or the time budget is spent.

        after_evaluation is called on the main process when an epoch's evaluation has been recorded.

        Raises:
            NonFiniteLoss: of a step, the weights after it or an evaluation; the last checkpoint stands.
            RunFailed: a rank or a process that reads images was lost; the last checkpoint stands.
            DatasetError: an image cannot be read; the last checkpoint stands.
            WriteError: the disk is full, or may no longer be written to; the last checkpoint stands.
            Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint of this very step has been written.
        """
        progress, config, run, accelerator = self.progress, self.config.train, self.run, self.accelerator
        total_steps = config.total_steps(self.steps_per_epoch)
        bar = tqdm(
            total=total_steps,
            initial=progress.step,
            unit="step",
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 20.0,
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        with self.stop.watched(), self._checkpoint_stands(), bar:
            while not self.finished:
                epoch = f"epoch {progress.epoch + 1}/{self.epochs}"
                bar.set_description(epoch, refresh=False)
                started = perf_counter()
                with closing(self.steps()) as steps:
                    while not self.epoch_is_trained:
                        if self.evaluates_now:  # one line more of the learning curve; "best" is an epoch's
                            bar.set_description(f"{epoch}, evaluating")
                            where = {"kind": "evaluation", "epoch": progress.epoch, "step": progress.step}
                            run.record({**where, **self._evaluated(), **self._seconds()})
                            bar.set_description(epoch, refresh=False)
                            started = perf_counter()
                        step = next(steps)
                        self.sums.add(step.names, step.values)
                        seconds, stop = self._agreed(perf_counter() - started, self.stop.received)
                        started = perf_counter()
                        progress.count_step(seconds, step.skipped)
                        if progress.skipped_in_a_row >= SKIPPED_AT_MOST:
                            row = f"of {SKIPPED_AT_MOST} steps in a row, up to step {progress.step}"
                            raise NonFiniteLoss(f"the float16 gradients {row}, are not finite at any scale")
                        log, checkpoint = (progress.step % n == 0 for n in (config.log_every, config.checkpoint_every))
                        save = checkpoint or stop or self.evaluates_now or self.epoch_is_trained
                        if log or save:  # only then is anything read back from the device
                            values = step.read(accelerator)
                            shown = {"loss": f"{values['loss']:.3f}", "lr": f"{values['learning_rate']:.1e}"}
                            if accelerator.scaler is not None:
                                shown["skipped"] = values["skipped_steps"] = progress.skipped
                            bar.set_postfix(shown, refresh=False)
                        if log:
                            where = {"kind": "step", "epoch": progress.epoch, "step": progress.step}
                            run.record({**where, **values, **self._seconds()})
                        if save:
                            run.save(self.state())
                        if config.time_budget:
                            affordable = int(progress.step * config.time_budget / progress.elapsed)
                            bar.total = min(total_steps, max(progress.step, affordable))
                        bar.update()
                        if stop:
                            raise Interrupted(int(stop), progress.step)

                metrics: dict[str, float | None] = {}
                best = False
                if progress.done(self.steps_per_epoch, config) or (progress.epoch + 1) % config.eval_every == 0:
                    bar.set_description(f"{epoch}, evaluating")
                    metrics = self._evaluated()
                    best = metrics["AP"] > progress.best.get("AP", -1.0)
                    progress.metrics = {**metrics, "epoch": progress.epoch + 1}
                    progress.best = progress.metrics if best else progress.best
                losses = {name: total / progress.step_in_epoch for name, total in self.sums.read().items()}
                where = {"kind": "epoch", "epoch": progress.epoch, "step": progress.step}
                run.record({**where, **losses, **metrics, **self._seconds()})
                progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
                self.sums = self._loss_sums()
                run.save(self.state(), best=best)
                if accelerator.is_main_process:
                    if metrics:
                        after_evaluation()
                    with suppress(OSError):  # the terminal has gone: SIGHUP comes, and stops the run after a step
                        scores = f"  {in_words(metrics)}" if metrics else ""
                        bar.write(f"{epoch}  loss {losses['loss']:.3f}{scores}", file=sys.stderr)

    def steps(self) -> Iterator[Step]:
        """Train from ``progress`` to the end of its epoch; yields after each step, which the caller counts.

        The steps depend on the weights, the optimizer and ``progress`` only, so a run continued from a checkpoint
        repeats the uninterrupted one: draws of a step depend on the seed, its number and the rank, in every detector
        alike. Losses are divided by the boxes of the global batch.

        Raises:
            NonFiniteLoss: the weights may be spoilt by then, but no step that was read is.
        """
        model, criterion, optimizer, dataset = self.model, self.criterion, self.optimizer, self.train_set
        progress, config, train, accelerator = self.progress, self.config, self.config.train, self.accelerator
        detector, pieces = accelerator.unwrap_model(model), accelerator.gradient_accumulation_steps
        dataset.set_epoch(progress.epoch)
        batches = epoch_batches(dataset.landscape, train.batch_size, train.seed, progress.epoch)
        share = (accelerator.process_index, accelerator.num_processes, pieces)
        loader = iter(batch_loader(dataset, micro_batches(batches[progress.step_in_epoch :], *share), train.workers))
        model.train()
        step = None
        while micros := list(islice(loader, pieces)):
            torch.manual_seed((train.seed * 1_000_003 + progress.step) * share[1] + share[0])
            factor = progress.learning_rate_factor(len(batches), train)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            routing = routing_values(config, progress.step, len(batches))
            detector.set_routing(*routing)
            settings = {
                "learning_rate": optimizer.param_groups[0]["lr"],
                "routing_strength": max(routing.strengths, default=0.0),
                "aux_weight": routing.aux_weight,
            }

            boxes = sum(len(target.labels) for batch in micros for target in batch.targets)
            box_count = accelerator.reduce(torch.full((), float(boxes), device=accelerator.device), "sum")
            box_count = box_count.clamp_min(1) / accelerator.num_processes  # gradients are averaged over the ranks
            values = 0
            for batch in micros:
                batch = batch.to(accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    try:
                        output = model(batch.images, batch.padding_mask, batch.targets)
                        losses = criterion(output, batch.targets, box_count)
                    except FloatingPointError as error:
                        if step is not None:
                            step.check()
                        raise NonFiniteLoss(f"no finite loss at step {progress.step + 1}: {error}") from error
                    values = values + torch.stack([part.detach() for part in losses.values()])
                    accelerator.backward(losses["loss"] * pieces)
                    if accelerator.sync_gradients:
                        average_gradients(accelerator, detector.decoder.routers)
                        norm = accelerator.clip_grad_norm_(model.parameters(), train.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm, device=values.device)
            skipped = accelerator.scaler is not None and optimizer.step_was_skipped  # which the scaler has read back
            step = Step(progress.step + 1, tuple(losses), values, norm, settings, skipped)
            yield step

    @property
    def epochs(self) -> int:
        """Those of the run, the last one perhaps cut short."""
        return math.ceil(self.config.train.total_steps(self.steps_per_epoch) / self.steps_per_epoch)

    @property
    def finished(self) -> bool:
        return self.progress.step_in_epoch == 0 and self.progress.done(self.steps_per_epoch, self.config.train)

    @property
    def epoch_is_trained(self) -> bool:
        """Whether the epoch has no step left; its evaluation may be to come."""
        last = self.progress.step_in_epoch == self.steps_per_epoch
        return last or self.progress.done(self.steps_per_epoch, self.config.train)

    @property
    def evaluates_now(self) -> bool:
        """Whether an evaluation inside the epoch is due after this very step."""
        progress, every = self.progress, self.config.train.eval_steps
        return every is not None and progress.step_in_epoch > 0 and progress.step % every == 0

    def _evaluated(self) -> dict[str, float | None]:
        """The metrics now; the seconds that they take are counted. The model trains on."""
        started = perf_counter()
        metrics = evaluate(
            *(self.model, self.val_set, self.config.train, self.accelerator),
            after_batch=lambda images: self._stop_if_asked(),
        )
        self.model.train()
        self.progress.elapsed += self._agreed(perf_counter() - started)[0]
        return metrics

    def _stop_if_asked(self) -> None:
        """Between evaluation batches: the checkpoint of the last step stands."""
        stop = int(self._agreed(self.stop.received)[0])
        if stop:
            raise Interrupted(stop, self.progress.step)

    def _agreed(self, *values: float) -> list[float]:
        """The maximum over the ranks of what they may see differently, without waiting for a device."""
        if self.host_group is None:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.host_group)
        return agreed.tolist()

    def _seconds(self) -> dict[str, float]:
        return {"seconds": round(self.progress.elapsed, 3), "train_seconds": round(self.progress.trained, 3)}

    @contextmanager
    def _checkpoint_stands(self) -> Iterator[None]:
        """Tell of an error that ends the run in one sentence, with the name of the checkpoint that stands."""
        stands = f"; {self.run.last} holds the run as it was before"
        try:
            yield
        except (NonFiniteLoss, FloatingPointError) as error:
            raise NonFiniteLoss(f"{error}{stands}") from error
        except (WriteError, PermissionError) as error:
            raise WriteError(f"{error}{'' if str(self.run.last) in str(error) else stands}") from error
        except RuntimeError as error:
            why = killed_worker(error)
            if is_lost_connection(error):
                rank = self.accelerator.process_index
                why = f"rank {rank} lost the connection to another process, which has ended"
            if why is None:
                raise
            raise RunFailed(f"{why}, at step {self.progress.step + 1}{stands}") from error
        except DatasetError as error:
            raise DatasetError(f"{error}{stands}") from error

    def _loss_sums(self, before: dict[str, float] | None = None) -> LossSums:
        return LossSums(lambda sums: self.accelerator.reduce(sums, "mean"), before)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_set) / self.config.train.batch_size)

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint: tensors and plain containers, nothing of how the ranks share them."""
        return {
            "preset": self.preset,
            **self._identity(),
            "threads": torch.get_num_threads(),
            **self._finite_weights(),
            "progress": self.progress.to_dict(),
            "loss_sums": self.sums.read(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }

    def _finite_weights(self) -> dict[str, Any]:
        """Weights and optimizer. Raises NonFiniteLoss where weights or statistics of norms are not finite."""
        weights = self._weights()
        if spoilt := not_finite(weights["model"]):
            raise NonFiniteLoss(f"the model is not finite after step {self.progress.step}: {spoilt}")
        return weights

    def _weights(self) -> dict[str, Any]:
        """Model and optimizer; under DeepSpeed scalars have a dimension and the optimizer keeps its state to itself."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            weights = whole(self.accelerator.get_state_dict(self.model))
            return {"model": {k: v.reshape(self.shapes[k]) for k, v in weights.items()}, "optimizer": None}
        return {"model": whole(self.detector.state_dict()), "optimizer": whole(self.optimizer.state_dict())}

    def _identity(self) -> dict[str, Any]:
        """The entries that tell this run from another: its configuration, and its data by content."""
        categories = zip(self.train_set.category_ids, self.train_set.category_names, strict=True)
        return {
            "config": self.config.to_dict(),
            "base": None if self.base is None else self.base.to_dict(),
            "data": self.data,
            "categories": [{"id": number, "name": name} for number, name in categories],
            "images": len(self.train_set),
            "digests": self._digests,
        }

    @cached_property
    def _digests(self) -> dict[str, dict[str, str]]:
        return {"training": digests(self.train_set), "validation": digests(self.val_set)}

    def _check_same_data(self, state: dict[str, Any]) -> None:
        """Raise `CheckpointError` for data other than those that the run began with; they may have moved."""
        now = self._identity()
        for name in ("categories", "images"):
            if state.get(name) != now[name]:
                raise CheckpointError(f"{self.run.last}: the training set's {name} have changed since the run began")
        if "digests" not in state and state["data"] != self.data:
            where = state["data"]["train_json"]
            raise CheckpointError(f"{self.run.last}: does not tell what its data hold, only where they were: {where}")
        for split, before in state.get("digests", {}).items():
            for name, digest in before.items():
                if self._digests[split][name] != digest:
                    raise CheckpointError(f"{self.run.last}: the {split} set's {name} have changed since the run began")

    def start(self) -> None:
        """Write the folder of a new run; from its first checkpoint on it can be resumed."""
        self.run.check_new()
        self.run.lock()
        self.run.check_new()  # another process may have begun, and ended, in between
        self.accelerator.wait_for_everyone()
        self._write_config()
        self.run.save(self.state())

    def resume(self) -> None:
        """Go back to the run's last checkpoint, in memory and in its records. Any number of ranks may go on."""
        self.run.check_resumable()
        self.run.lock()
        state = load_checkpoint(self.run.last)
        if state["optimizer"] is None or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise CheckpointError(f"{self.run.last}: a run under DeepSpeed cannot be resumed, only begun from: --init")
        self._check_same_data(state)
        try:
            load_model(self.detector, state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.progress = Progress(**state["progress"])
            self.sums = self._loss_sums(state["loss_sums"])
            if self.accelerator.scaler is not None and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.run.last}: does not fit this run: {error}") from error
        self.accelerator.wait_for_everyone()
        self.run.rewind(self.progress.epoch, self.progress.step)
        if changed := {name: value for name, value in self._identity().items() if state.get(name) != value}:
            self.run.amend(changed)  # where the data are now, how long the run is to be
        self._write_config()

    def _write_config(self) -> None:
        here = {
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
            "distributed": str(self.accelerator.distributed_type.value),
            "precision": self.accelerator.mixed_precision,
            "accumulation": self.accelerator.gradient_accumulation_steps,
        }
        self.run.write_config({**self.config.to_dict(), "data": self.data, **here})

    def summary(self) -> str:
        """Average precision of the latest and the best evaluation, in words."""
        latest, best = self.progress.metrics, self.progress.best
        return (
            f"main branch (plain self-attention): {in_words(latest)} "
            f"after {latest['epoch']} epochs, {self.progress.step} steps, {self.progress.elapsed:.0f} s; "
            f"best {in_words(best)} (epoch {best['epoch']})"
        )
