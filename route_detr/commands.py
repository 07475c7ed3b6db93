"""What each command of route-detr does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from route_detr import data as detection_data
from route_detr.checkpoint import load_checkpoint, write_text
from route_detr.cli import FIELDS, run_folder
from route_detr.config import Config, preset
from route_detr.data import CocoDetection, coco_layout, read_rgb
from route_detr.data.images import opened
from route_detr.engine import evaluate as evaluate_detector
from route_detr.errors import NonFiniteLoss, UsageError
from route_detr.evaluation import table
from route_detr.plots import plot_curves, plot_detections, plot_routing, plot_schedule
from route_detr.prediction import Trained, detection_examples, image_files, load_trained, predict_files
from route_detr.run import Run, find_checkpoint
from route_detr.training import Training

BUNDLED_DATA = "data/digits"
DATA_OPTIONS = ("train_json", "train_images", "val_json", "val_images")
PICTURES = 4
SHOWN_SCORE = 0.3
RESULT_NEUTRAL = ("train.workers",)  # may change when a run is resumed


def _parsed_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _overrides(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Dotted key -> (the option that sets it, value) for all configuration that the command line gives."""
    changes: dict[str, tuple[str, Any]] = {}
    for option, (key, _) in FIELDS.items():
        value = getattr(args, option, None)
        if value is not None:
            changes[key] = ("--" + option.replace("_", "-"), value)
    if getattr(args, "route", None) is not None:
        changes["detector.route"] = ("--route" if args.route else "--no-route", args.route)
    for setting in args.set:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: expected KEY=VALUE, as train.clip_norm=0.2")
        if key in changes:
            raise UsageError(f"--set {key}: given by {changes[key][0]} too")
        changes[key] = (f"--set {key}", _parsed_value(value))
    return changes


def _updated(config: Config, changes: dict[str, tuple[str, Any]]) -> Config:
    """All changes at once, for some fit together only; the error names the option that is wrong by itself."""
    try:
        return config.updated({key: value for key, (_, value) in changes.items()})
    except ValueError as error:
        for key, (option, value) in changes.items():
            try:
                config.updated({key: value})
            except ValueError as alone:
                if str(alone) == str(error):
                    raise UsageError(f"{option}: {error}") from error
        raise


def _device(args: argparse.Namespace) -> torch.device:
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _data_paths(args: argparse.Namespace, splits: Sequence[str]) -> dict[str, str] | None:
    """What the command line says about the data, as absolute paths; None when it says nothing."""
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
    run = Run(run_folder(args))
    training = _resumed(args, run) if args.resume else _started(args, run)
    try:
        training.fit()
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{error}; {run.last} holds the run as it was before and is untouched") from error
    finally:
        run.close()
    plot_curves(run.records(), run.folder / "curves.png")
    pictures = ["curves.png", *_draw(run, training.val_set, training.device)]
    print(training.summary())
    print(f"files in {run.folder}: {', '.join(['metrics.jsonl', 'config.json', 'best.pt', 'last.pt', *pictures])}")
    return 0


def _started(args: argparse.Namespace, run: Run) -> Training:
    run.check_new()
    name = args.preset or "tiny"
    changes = _overrides(args)
    config = _updated(preset(name), changes)
    device = _device(args)
    paths = _data_paths(args, ("train", "val"))
    if paths is None:
        if not Path(BUNDLED_DATA).is_dir():
            detection_data.write_digits(BUNDLED_DATA)
        args.data = Path(BUNDLED_DATA)
        paths = _data_paths(args, ("train", "val"))
    training = Training(run, config, paths, device, preset=name)
    classes = training.config.detector.num_classes
    if changes.get("detector.num_classes", ("", classes))[1] != classes:
        raise UsageError(f"--set detector.num_classes: the data set has {classes} categories")
    training.start()
    return training


def _resumed(args: argparse.Namespace, run: Run) -> Training:
    run.check_resumable()
    state = load_checkpoint(run.last)
    stored, data = Config.from_dict(state["config"]), state["data"]
    if args.preset not in (None, state["preset"]):
        raise UsageError(f"--preset {args.preset}: the run to resume began with --preset {state['preset']}")
    config = stored
    for key, (option, value) in _overrides(args).items():
        changed = _updated(stored, {key: (option, value)})
        if key in RESULT_NEUTRAL:
            config = changed
        elif changed != stored:
            raise UsageError(f"{option} = {value}: the run to resume has another value; leave the option out")
    for name, path in (_data_paths(args, ("train", "val")) or {}).items():
        if path != data[name]:
            raise UsageError(f"--data, --{name.replace('_', '-')}: {path}, but the run to resume has {data[name]}")
    if args.threads is None:
        args.threads = state["threads"]
    training = Training(run, config, data, _device(args), preset=state["preset"])
    training.resume()
    return training


def _draw(run: Run, val_set: CocoDetection, device: torch.device) -> list[str]:
    """detections.png and routing.png of the run's best checkpoint."""
    trained = load_trained(run.best, device)
    examples = detection_examples(trained, val_set, range(min(PICTURES, len(val_set))), SHOWN_SCORE)
    plot_detections(examples, trained.category_names, run.folder / "detections.png")
    if not trained.config.detector.route:
        return ["detections.png"]
    plot_routing(val_set.raw_image(0), trained.routing(val_set.raw_image(0)), run.folder / "routing.png")
    return ["detections.png", "routing.png"]


def _load(args: argparse.Namespace) -> tuple[Path, Trained]:
    path = find_checkpoint(args.trained, args.checkpoint)
    return path, load_trained(path, _device(args))


def _val_set(paths: dict[str, str], trained: Trained) -> CocoDetection:
    dataset = CocoDetection(paths["val_json"], paths["val_images"], trained.config.transforms)
    known = dict(zip(trained.category_ids, trained.category_names, strict=True))
    for number, name in zip(dataset.category_ids, dataset.category_names, strict=True):
        if known.get(number) != name:
            raise UsageError(
                f"{paths['val_json']}: category {number} is {name!r}, for the detector {known.get(number, 'unknown')!r}"
            )
    return dataset


def evaluate(args: argparse.Namespace) -> int:
    checkpoint, trained = _load(args)
    paths = _data_paths(args, ("val",)) or trained.data
    dataset = _val_set(paths, trained)
    with tqdm(total=len(dataset), unit="image", desc="evaluating", leave=False) as bar:
        metrics = evaluate_detector(
            *(trained.detector, dataset, trained.config.train, trained.device, trained.category_ids),
            after_batch=lambda images: bar.update(images - bar.n),
        )
    print(table(metrics))
    out = args.out or checkpoint.with_name(f"eval-{checkpoint.stem}.json")
    record = {"checkpoint": str(checkpoint), "annotations": paths["val_json"], "images": len(dataset), **metrics}
    write_text(out, json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")
    return 0


def predict(args: argparse.Namespace) -> int:
    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"--score-threshold: expected a number in 0..1, got {args.score_threshold}")
    files = image_files(args.images)
    for file in files:
        with opened(file):  # a file that is no image is told before any work is done
            pass
    _, trained = _load(args)
    pictures = predict_files(trained, files, args.out, args.score_threshold)
    count = sum(1 for _ in tqdm(pictures, total=len(files), unit="image", leave=False))
    print(f"{count} pictures and predictions.json written to {args.out}")
    return 0


def inspect_routing(args: argparse.Namespace) -> int:
    checkpoint, trained = _load(args)
    if not trained.config.detector.route:
        raise UsageError(f"{checkpoint}: trained with --no-route, it has no routing to show")
    image = read_rgb(args.image) if args.image else _val_set(trained.data, trained).raw_image(0)
    out = args.out or checkpoint.with_name("routing.png")
    plot_routing(image, trained.routing(image), out)
    print(f"written to {out}")
    return 0


def inspect_schedule(args: argparse.Namespace) -> int:
    plot_schedule(_updated(preset(args.preset), _overrides(args)), args.out)
    print(f"written to {args.out}")
    return 0


def write_digits(args: argparse.Namespace) -> int:
    sizes = {name: getattr(args, name) for name in ("seed", "train_images", "val_images", "image_size")}
    written = detection_data.write_digits(args.out, **sizes)
    print(f"{'written to' if written else 'already in'} {args.out}")
    return 0
