"""One epoch of training and one evaluation, in one process or in many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from route_detr.config import Config, TrainConfig
from route_detr.data import CocoDetection, batch_loader, epoch_batches, micro_batches
from route_detr.errors import NonFiniteLoss
from route_detr.evaluation import average_precision, coco_results
from route_detr.model.criterion import Criterion
from route_detr.model.detector import detections
from route_detr.model.schedule import routing_values
from route_detr.progress import Progress
from route_detr.scale_out import average_gradients, everybodys


class Step(NamedTuple):
    """What a training step has computed, on the device until it is read."""

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


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    dataset: CocoDetection,
    progress: Progress,
    config: Config,
    accelerator: Accelerator,
) -> Iterator[Step]:
    """Train from ``progress`` to the end of its epoch; yields after each step, which the caller counts.

    The steps depend on the weights, the optimizer, ``progress`` and the random generators' states only, so a run
    continued from a checkpoint repeats the uninterrupted one. Losses are divided by the boxes of the global batch.

    Raises:
        NonFiniteLoss: the weights may be spoilt by then, but no step that was read is.
    """
    detector, pieces = accelerator.unwrap_model(model), accelerator.gradient_accumulation_steps
    train = config.train
    dataset.set_epoch(progress.epoch)
    batches = epoch_batches(dataset.landscape, train.batch_size, train.seed, progress.epoch)
    share = (accelerator.process_index, accelerator.num_processes, pieces)
    loader = iter(batch_loader(dataset, micro_batches(batches[progress.step_in_epoch :], *share), train.workers))
    model.train()
    step = None
    while micros := list(islice(loader, pieces)):
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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: CocoDetection,
    config: TrainConfig,
    accelerator: Accelerator,
    category_ids: list[int] | None = None,
    after_batch: Callable[[int], object] = lambda images: None,
) -> dict[str, float | None]:
    """Average precision of the main branch (plain self-attention) on ``dataset``, which the ranks share; alike on all.

    ``category_ids`` gives the COCO category of each label where it is not the data set's own.
    ``after_batch`` is called with the number of images that this rank has done, equally often on all.

    Raises:
        NoGroundTruth: the data set has no box to be found.
        FloatingPointError: the detector computes NaN or infinity for one of the images.
    """
    model.eval()
    indices = list(range(len(dataset)))
    batches = [indices[start : start + config.batch_size] for start in range(0, len(dataset), config.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    rounds = math.ceil(len(batches) / accelerator.num_processes)
    results, image_ids = [], []
    # A rank without a last batch computes one in vain: a sharded model needs all ranks to run it.
    for turn, batch in enumerate(batch_loader(dataset, mine + batches[: rounds - len(mine)], config.workers)):
        batch = batch.to(accelerator.device, non_blocking=True)
        output = model(batch.images, batch.padding_mask)
        if turn < len(mine):
            ids = [target.image_id for target in batch.targets]
            sizes, seen = zip(*((target.original_size, target.size) for target in batch.targets), strict=True)
            try:
                found = detections(output, sizes, config.top_k, seen)
            except FloatingPointError as error:
                raise FloatingPointError(f"no average precision of the images with the ids {ids}: {error}") from error
            results += coco_results(found, ids, category_ids or dataset.category_ids)
            image_ids += ids
        after_batch(len(image_ids))
    shares = everybodys((results, image_ids))
    results, image_ids = ([entry for share in shares for entry in share[part]] for part in (0, 1))
    return average_precision(dataset.coco, results, image_ids, masks=output.pixel_embeddings is not None)
