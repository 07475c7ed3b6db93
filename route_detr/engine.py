"""One epoch of training and one evaluation."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from route_detr.config import Config, TrainConfig
from route_detr.criterion import Criterion
from route_detr.data import CocoDetection, collate
from route_detr.detector import Detector, detections
from route_detr.errors import NonFiniteLoss
from route_detr.evaluation import average_precision, coco_results
from route_detr.progress import Progress
from route_detr.schedule import routing_values


def epoch_batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The order of an epoch: a pure function of (seed, epoch), so that a resumed run can start inside it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(samples, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, samples, batch_size)]


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batch_loader(dataset: CocoDetection, batches: list[list[int]], workers: int) -> DataLoader:
    """Batches of these indices. Draws nothing from the global random number generator."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )


def check_finite(losses: dict[str, float], step: int) -> None:
    """Raise `NonFiniteLoss` that names the parts of the loss that are not finite."""
    if not all(map(math.isfinite, losses.values())):
        named = ", ".join(f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value))
        raise NonFiniteLoss(f"the loss is not finite at step {step}: {named}")


def train_one_epoch(
    detector: Detector,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    dataset: CocoDetection,
    progress: Progress,
    run_config: Config,
    device: torch.device,
) -> Iterator[dict[str, float]]:
    """Train from ``progress`` to the end of its epoch, or of the time budget; yields after each step.

    What is yielded holds the step's losses, ``grad_norm``, ``learning_rate`` (of the first parameter group),
    ``routing_strength`` and ``aux_weight``. The steps depend on the weights, the optimizer, ``progress`` and the
    random generators' states only, so a run continued from a checkpoint repeats the uninterrupted one.

    Raises:
        NonFiniteLoss: before anything is written to the parameters.
    """
    config = run_config.train
    dataset.set_epoch(progress.epoch)
    batches = epoch_batches(len(dataset), config.batch_size, config.seed, progress.epoch)
    loader = batch_loader(dataset, batches[progress.step_in_epoch :], config.workers)
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    detector.train()
    started = time.perf_counter()
    for batch in loader:
        factor = progress.learning_rate_factor(len(batches), config)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        routing = routing_values(run_config, progress.step, len(batches))
        detector.set_routing(*routing)

        batch = batch.to(device)
        try:
            losses = criterion(detector(batch.images, batch.padding_mask, batch.targets), batch.targets)
        except FloatingPointError as error:
            raise NonFiniteLoss(f"no finite loss at step {progress.step + 1}: {error}") from error
        values = dict(zip(losses, torch.stack([part.detach() for part in losses.values()]).tolist(), strict=True))
        check_finite(values, progress.step + 1)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm).item()
        check_finite({"gradient norm": norm}, progress.step + 1)
        optimizer.step()

        now = time.perf_counter()
        progress.count_step(values, now - started)
        started = now
        rate, strength = optimizer.param_groups[0]["lr"], max(routing.strengths, default=0.0)
        scheduled = {"learning_rate": rate, "routing_strength": strength, "aux_weight": routing.aux_weight}
        yield {**values, "grad_norm": norm, **scheduled}
        if progress.out_of_time(config):
            return


@torch.no_grad()
def evaluate(
    detector: Detector,
    dataset: CocoDetection,
    config: TrainConfig,
    device: torch.device,
    category_ids: list[int] | None = None,
    after_batch: Callable[[int], object] = lambda images: None,
) -> dict[str, float | None]:
    """Average precision of the main branch (plain self-attention) on ``dataset``.

    ``category_ids`` gives the COCO category of each label where it is not the data set's own.
    ``after_batch`` is called with the number of images done.

    Raises:
        NoGroundTruth: the data set has no box to be found.
    """
    detector.eval()
    indices = list(range(len(dataset)))
    batches = [indices[start : start + config.batch_size] for start in range(0, len(indices), config.batch_size)]
    results, image_ids = [], []
    for batch in batch_loader(dataset, batches, config.workers):
        batch = batch.to(device)
        ids = [target.image_id for target in batch.targets]
        output = detector(batch.images, batch.padding_mask)
        found = detections(output, [target.original_size for target in batch.targets], config.top_k)
        results += coco_results(found, ids, category_ids or dataset.category_ids)
        image_ids += ids
        after_batch(len(image_ids))
    return average_precision(dataset.coco, results, image_ids)
