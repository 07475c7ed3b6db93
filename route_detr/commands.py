"""The commands of route-detr, a function each."""

from __future__ import annotations

import argparse
import json
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from pydantic import ValidationError
from tqdm import tqdm

from route_detr.cli import run_folder
from route_detr.config import Config, first_error, load_config, preset
from route_detr.data.batches import killed_worker
from route_detr.data.check import as_text
from route_detr.data.check import check_data as check_data_set
from route_detr.data.coco import CocoDetection, coco_layout
from route_detr.data.images import read_rgb
from route_detr.errors import RunError, RunFailed, UsageError
from route_detr.evaluation import evaluate as evaluate_detector
from route_detr.evaluation import table
from route_detr.files import SOFTWARE, check_replaceable, with_folder, write_text
from route_detr.memory.command import plan_memory  # noqa: F401
from route_detr.predict import (
    PREDICTIONS,
    Trained,
    image_files,
    load_trained,
    pictures_of,
    predict_files,
    stored_config,
)
from route_detr.run import Run, find_checkpoint, load_checkpoint, save_checkpoint
from route_detr.scale_out import start_processes, take_weights
from route_detr.tools import digits
from route_detr.tools.cityscapes import write_cityscapes as write_cityscapes_folder
from route_detr.tools.export import export as export_detector
from route_detr.tools.importing import imported, read_published
from route_detr.tools.plots import plot_curves, plot_detections, plot_routing, plot_schedule
from route_detr.train import Training

BUNDLED_DATA = "data/digits"
DATA_OPTIONS = ("train_json", "train_images", "val_json", "val_images")
PICTURES, SHOWN_SCORE = 4, 0.3
LENGTHS = ("train.epochs", "train.time_budget")
RESUMABLE = (*LENGTHS, "train.workers", "train.accumulate")  # what may change when a run is resumed


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value for all that the command line says of single fields."""
    words = list(args.overrides)
    if args.route is not None:
        words.append(f"detector.route={json.dumps(args.route)}")
    if args.routed_layers is not None:
        words.append(f"detector.routed_layers={args.routed_layers}")
    changes: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise UsageError(f"{word}: expected KEY=VALUE, as train.epochs=24")
        if key in changes:
            raise UsageError(f"{key}: given twice")
        changes[key] = yaml.safe_load(value)
    return changes


def _configured(args: argparse.Namespace, init: Path | None = None) -> tuple[str, Config]:
    """The name of the preset or the file to start from, and the configuration with what overrides it.

    Without either, what ``init`` was trained with.
    """
    if args.preset and args.config:
        raise UsageError("--preset and --config: expected one of them, got both (a file names its preset as `base`)")
    if init is not None and not args.preset and not args.config:
        state = load_checkpoint(init)
        return state.get("preset", str(init)), stored_config(state, init).updated(_overrides(args))
    name = str(args.config or args.preset or "tiny")
    return name, (load_config(name) if args.config else preset(name)).updated(_overrides(args))


def _check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raise `UsageError` for an option that is given and is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


def _processes(args: argparse.Namespace) -> Accelerator:
    _check_numbers(args, "threads")
    accelerator = start_processes(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return accelerator


def _data_paths(args: argparse.Namespace, splits: Sequence[str]) -> dict[str, str] | None:
    """The data's absolute paths that the command line gives; None when it gives none."""
    given = {option: getattr(args, option, None) for option in DATA_OPTIONS}
    if args.data is None and not any(given.values()):
        return None
    layout = coco_layout(args.data, **given, splits=splits)
    paths = {}
    for split in splits:
        found = getattr(layout, split)
        paths[f"{split}_json"] = str(found.annotations.resolve())
        paths[f"{split}_images"] = str(found.images.resolve())
    return paths


def train(args: argparse.Namespace) -> int:
    if args.name and args.out:
        raise UsageError("--name and --out: expected one of them, got both")
    run = Run(run_folder(args), writes=int(os.environ.get("RANK", 0)) == 0)
    try:
        training = _resumed(args, run) if args.resume else _started(args, run)
        training.fit()
        if run.writes:
            print(training.summary())
            pictures = run.draw("curves.png", lambda path: plot_curves(run.records(), path))
            pictures += _draw(run, training)
    finally:
        run.close()
    if run.writes:
        print(f"files in {run.folder}: {', '.join(['metrics.jsonl', 'config.json', 'best.pt', 'last.pt', *pictures])}")
    training.accelerator.end_training()
    return 0


def _started(args: argparse.Namespace, run: Run) -> Training:
    if args.init_partial and not args.init:
        raise UsageError("--init-partial: expected with --init RUN, got none")
    run.check_new()
    init = find_checkpoint(args.init) if args.init else None
    name, config = _configured(args, init)
    accelerator = _processes(args)
    paths = _data_paths(args, ("train", "val"))
    if paths is None:
        with accelerator.local_main_process_first():
            if not Path(BUNDLED_DATA).is_dir():
                digits.write_digits(BUNDLED_DATA)
        args.data = Path(BUNDLED_DATA)
        paths = _data_paths(args, ("train", "val"))
    backbone_is_read = config.detector.backbone.weights is not None and (init is None or args.init_partial)
    training = Training(
        run,
        config,
        paths,
        accelerator,
        preset=name,
        base=load_config(args.config) if args.config else None,
        cache=args.cache,
        weights_follow=init is not None and not backbone_is_read,
    )
    classes = training.config.detector.num_classes
    if _overrides(args).get("detector.num_classes", classes) != classes:
        raise UsageError(f"detector.num_classes: the data set has {classes} categories")
    if init is not None:
        told = take_weights(training.detector, init, training.train_set.category_names, args.init_partial)
        if run.writes:
            print(told)
    training.start()
    return training


def _resumed(args: argparse.Namespace, run: Run) -> Training:
    if args.init:
        raise UsageError("--init and --resume: expected one of them, got both")
    run.check_resumable()
    run.lock()
    state = load_checkpoint(run.last)
    config, base = _resumed_config(args, run, state)
    data = _resumed_data(args, run, state["data"])
    if args.threads is None:
        args.threads = state["threads"]
    names = {"preset": state["preset"], "base": base}
    training = Training(run, config, data, _processes(args), **names, cache=args.cache, weights_follow=True)
    training.resume()
    return training


def _resumed_config(args: argparse.Namespace, run: Run, state: dict[str, Any]) -> tuple[Config, Config | None]:
    """The configuration of a run with what may change in it, and what its --config file says."""
    stored = stored_config(state, run.last)
    base = state.get("base") and Config.from_dict(state["base"])
    changes, now = _overrides(args), base
    if args.config and base is not None:  # by what the file says, whatever its name
        now = load_config(args.config)
        changes = {key: value for key, (value, _) in now.differences(base).items()} | changes
    elif str(args.config or args.preset or state["preset"]) != state["preset"]:
        raise UsageError(f"--preset, --config: the run to resume began with {state['preset']}")
    elif base is not None and Path(state["preset"]).is_file():
        edited = load_config(state["preset"]).differences(base)
        if edited:
            told = ", ".join(f"{key} from {before!r} to {after!r}" for key, (after, before) in edited.items())
            warnings.warn(
                f"{state['preset']}: edited since the run began ({told}), which keeps its values", stacklevel=2
            )
    config = stored.updated(changes)
    for key, (value, before) in config.differences(stored).items():
        if key not in RESUMABLE:
            where = key if key in _overrides(args) else f"{args.config}: {key}"
            raise UsageError(f"{where}={value}: the run to resume has another value, {before}; leave it out")
    progress, train = state["progress"], config.train
    if train.epochs <= progress["epoch"] and train.epochs != stored.train.epochs:
        done = f"the run to resume has done {progress['epoch']} epochs"
        raise UsageError(f"train.epochs={train.epochs}: {done}; expected more than that")
    if train.time_budget != stored.train.time_budget and (train.time_budget or math.inf) <= progress["elapsed"]:
        spent = f"the run to resume has taken {progress['elapsed']:.0f} s"
        raise UsageError(f"train.time_budget={train.time_budget}: {spent}; expected more than that")
    for key, (value, before) in config.differences(stored).items():
        if key in LENGTHS and run.writes:
            print(f"{key}={value}, not {before}: the learning rate drops at {train.drop_at:.0%} of the new length")
    return config, now


def _resumed_data(args: argparse.Namespace, run: Run, stored: dict[str, str]) -> dict[str, str]:
    """Where the data of a run are now: as the command line says, else where they were."""
    if args.data is None:
        for option in DATA_OPTIONS:
            if getattr(args, option) is None:
                if not Path(stored[option]).exists():
                    moved = "say where its data are now with --data ROOT, if they have moved"
                    raise RunError(f"{run.folder}: {stored[option]} is no longer there; {moved}")
                setattr(args, option, Path(stored[option]))
    return _data_paths(args, ("train", "val"))


def _draw(run: Run, training: Training) -> list[str]:
    """detections.png and routing.png of the run's best checkpoint; those that could be drawn."""
    val_set, detector = training.val_set, training.config.detector
    best = cache(lambda: load_trained(run.best, training.accelerator.device))

    def draw_detections(path: Path) -> None:
        images = [val_set.raw_image(index) for index in range(min(PICTURES, len(val_set)))]
        truths = [{"boxes": val_set.boxes(index), "labels": val_set.labels(index)} for index in range(len(images))]
        if detector.masks:
            for index, truth in enumerate(truths):
                truth["masks"] = torch.from_numpy(val_set.masks(index)).permute(2, 0, 1).bool()
        found = [best().detect(image, SHOWN_SCORE) for image in images]
        plot_detections(images, truths, found, best().category_names, path)

    def draw_routing(path: Path) -> None:
        image = val_set.raw_image(0)
        plot_routing(image, best().routing(image), path)

    drawn = run.draw("detections.png", draw_detections)
    return drawn + (run.draw("routing.png", draw_routing) if detector.route else [])


def _load(args: argparse.Namespace, device: torch.device) -> Trained:
    return load_trained(find_checkpoint(args.trained, args.checkpoint), device)


def _val_set(paths: dict[str, str], trained: Trained, option: str) -> CocoDetection:
    """``option`` gives what is asked for where the checkpoint knows of no data."""
    if "val_json" not in paths:
        raise UsageError(f"{option}: expected, since the checkpoint was not trained here and names no data set")
    masks = trained.config.detector.masks
    dataset = CocoDetection(paths["val_json"], paths["val_images"], trained.config.transforms, masks=masks)
    known = dict(zip(trained.category_ids, trained.category_names, strict=True))
    for number, name in zip(dataset.category_ids, dataset.category_names, strict=True):
        if known.get(number) != name:
            raise UsageError(
                f"{paths['val_json']}: category {number} is {name!r}, for the detector {known.get(number, 'unknown')!r}"
            )
    return dataset


def evaluate(args: argparse.Namespace) -> int:
    checkpoint = find_checkpoint(args.trained, args.checkpoint)
    out = args.out or checkpoint.with_name(f"eval-{checkpoint.stem}.json")
    check_replaceable("JSON", out)
    accelerator = _processes(args)
    trained = load_trained(checkpoint, accelerator.device)
    paths = _data_paths(args, ("val",)) or trained.data
    dataset = _val_set(paths, trained, "--data ROOT, or --val-json and --val-images")
    main = accelerator.is_main_process
    with tqdm(total=len(dataset), unit="image", desc="evaluating", leave=False, disable=None if main else True) as bar:
        try:
            metrics = evaluate_detector(
                *(trained.detector, dataset, trained.config.train, accelerator, trained.category_ids),
                after_batch=lambda images: bar.update(images * accelerator.num_processes - bar.n),
            )
        except RuntimeError as error:
            if (why := killed_worker(error)) is None:
                raise
            raise RunFailed(why) from error
    if main:
        print(table(metrics))
        record = {"software": SOFTWARE, "checkpoint": str(checkpoint), "annotations": paths["val_json"]}
        record |= {"images": len(dataset), **metrics}
        write_text(with_folder(out), json.dumps(record, indent=2) + "\n")
        print(f"written to {out}")
    accelerator.end_training()
    return 0


def predict(args: argparse.Namespace) -> int:
    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"--score-threshold: expected a number in 0..1, got {args.score_threshold}")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out: expected a folder, {args.out} is a file")
    for given in args.images:
        if args.out.exists() and os.path.isdir(given) and args.out.samefile(given):
            raise UsageError(f"--out: expected another folder than that of the images, got {args.out}")
    files = image_files(args.images)
    check_replaceable("predictions", args.out / PREDICTIONS)
    check_replaceable("picture", *pictures_of(files, args.out))
    trained = _load(args, _processes(args).device)
    with closing(predict_files(trained, files, args.out, args.score_threshold)) as prediction:
        done = tqdm(prediction, total=len(files), unit="image", leave=False, disable=None)
        unread = [str(error) for error in done if error is not None]
    print(f"{len(files) - len(unread)} pictures and {PREDICTIONS} written to {args.out}")
    if unread:
        raise RunFailed(f"{len(unread)} of {len(files)} images: {'; '.join(unread)}")
    return 0


def export(args: argparse.Namespace) -> int:
    trained = _load(args, torch.device("cpu"))
    print(export_detector(trained, args.out, args.size))
    return 0


def import_weights(args: argparse.Namespace) -> int:
    """A public checkpoint as one of ours: eval, predict and export read it, train begins with it (--init)."""
    check_replaceable("checkpoint", args.out)
    if args.out.is_file() and args.out.with_name("metrics.jsonl").exists():
        raise UsageError(f"--out: {args.out} is of a run and is not replaced; choose another name")
    state, config, names = read_published(args.source)
    if args.preset or args.config:
        _, config = _configured(args)
    else:
        config = config.updated(_overrides(args))
    detector = imported(state, config)
    if args.categories:
        content = json.loads(args.categories.read_text(encoding="utf-8"))
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    categories = [{"id": i, "name": names.get(i, str(i))} for i in range(config.detector.num_classes)]
    content = {"config": config.to_dict(), "categories": categories, "model": detector.state_dict(), "data": {}}
    save_checkpoint(with_folder(args.out), content)
    print(f"{len(detector.state_dict())} tensors of {args.source} written to {args.out}")
    return 0


def inspect_routing(args: argparse.Namespace) -> int:
    checkpoint = find_checkpoint(args.trained, args.checkpoint)
    out = args.out or checkpoint.with_name("routing.png")
    check_replaceable("picture", out)
    trained = load_trained(checkpoint, _processes(args).device)
    if not trained.config.detector.route:
        raise UsageError(f"{checkpoint}: trained with --no-route, it has no routing to show")
    image = read_rgb(args.image) if args.image else _val_set(trained.data, trained, "--image").raw_image(0)
    plot_routing(image, trained.routing(image), with_folder(out))
    print(f"written to {out}")
    return 0


def inspect_schedule(args: argparse.Namespace) -> int:
    _check_numbers(args, "images")
    check_replaceable("picture", args.out)
    _, config = _configured(args)
    plot_schedule(config, -(-args.images // config.train.batch_size), with_folder(args.out))
    print(f"written to {args.out}")
    return 0


def check_data(args: argparse.Namespace) -> int:
    _check_numbers(args, "workers")
    if args.json is not None:
        check_replaceable("JSON", args.json)
    layout = coco_layout(args.data, **{option: getattr(args, option) for option in DATA_OPTIONS})
    found = check_data_set(layout, args.masks, args.workers)
    print(as_text(found))
    if args.json is not None:
        write_text(with_folder(args.json), json.dumps({"software": SOFTWARE, **found}, indent=1) + "\n")
        print(f"written to {args.json}")
    return 0 if found["trainable"] else 1


def write_digits(args: argparse.Namespace) -> int:
    sizes = {name: getattr(args, name) for name in ("seed", "train_images", "val_images", "image_size")}
    try:
        written = digits.write_digits(args.out, **sizes)
    except ValidationError as error:
        raise UsageError(first_error(error)) from error
    print(f"{'written to' if written else 'already in'} {args.out}")
    return 0


def write_cityscapes(args: argparse.Namespace) -> int:
    _check_numbers(args, "workers")
    counts = write_cityscapes_folder(args.root, args.out, args.workers)
    print(f"written to {args.out}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return 0
