"""route-detr train | eval | predict | inspect | data."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from route_detr.errors import Interrupted, NonFiniteLoss, UsageError

if TYPE_CHECKING:
    import torch

    from route_detr.config import Config
    from route_detr.data import CocoDetection
    from route_detr.prediction import Trained
    from route_detr.run import Run
    from route_detr.training import Training

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
BUNDLED_DATA = "data/digits"
DATA_OPTIONS = ("train_json", "train_images", "val_json", "val_images")
PICTURES = 4
SHOWN_SCORE = 0.3
INPUT_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
# Command-line options that set one field of the configuration.
FIELDS = {
    "epochs": ("train.epochs", int),
    "batch_size": ("train.batch_size", int),
    "learning_rate": ("train.learning_rate", float),
    "seed": ("train.seed", int),
    "workers": ("train.workers", int),
    "eval_every": ("train.eval_every", int),
    "time_budget": ("train.time_budget", float),
}
RESULT_NEUTRAL = ("train.workers",)  # may change when a run is resumed


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="route-detr", description="Train and use a routed detector (Route-DETR).")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    computing = argparse.ArgumentParser(add_help=False)
    computing.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto: cuda where there is one")
    computing.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    commands = top.add_subparsers(dest="command", required=True, metavar="train | eval | predict | inspect | data")

    train = commands.add_parser("train", parents=[common, computing], help="train a detector")
    train.set_defaults(run=_train)
    train.add_argument("--preset", help="named configuration to start from (default: tiny)")
    _add_data_options(train, ("train", "val"), "without any: the bundled crowded digits, written to data/digits once")
    train.add_argument("--name", help="name of the run: its folder is runs/NAME (default: the preset's name)")
    train.add_argument("--out", type=Path, help="the run's folder, instead of runs/NAME")
    train.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
    for option, (key, kind) in FIELDS.items():
        extra = "seconds after which training ends: " if option == "time_budget" else ""
        train.add_argument("--" + option.replace("_", "-"), type=kind, help=f"{extra}{key}")
    train.add_argument("--route", action=argparse.BooleanOptionalAction, help="--no-route trains the plain baseline")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any field of config.json")

    evaluate = commands.add_parser("eval", parents=[common, computing], help="average precision of a trained detector")
    evaluate.set_defaults(run=_evaluate)
    _add_run_argument(evaluate)
    _add_data_options(evaluate, ("val",), "default: the validation set of the run")
    evaluate.add_argument("--out", type=Path, help="JSON file (default: eval-CHECKPOINT.json in the run)")

    predict = commands.add_parser("predict", parents=[common, computing], help="find objects in image files")
    predict.set_defaults(run=_predict)
    _add_run_argument(predict)
    predict.add_argument("images", nargs="+", help="image files, or folders of images")
    predict.add_argument("--out", type=Path, required=True, help="folder for the pictures and predictions.json")
    predict.add_argument("--score-threshold", type=float, default=0.3, help="leave out less certain detections (0.3)")

    inspect = commands.add_parser("inspect", help="pictures of what routing does")
    topics = inspect.add_subparsers(dest="topic", required=True, metavar="routing | schedule")
    routing = topics.add_parser("routing", parents=[common, computing], help="learned bias and gate of one image")
    routing.set_defaults(run=_inspect_routing)
    _add_run_argument(routing)
    routing.add_argument("--image", type=Path, help="image file (default: the first validation image of the run)")
    routing.add_argument("--out", type=Path, help="picture to write (default: routing.png beside the checkpoint)")
    schedule = topics.add_parser("schedule", parents=[common], help="lambda(t) and alpha(t)")
    schedule.set_defaults(run=_inspect_schedule)
    schedule.add_argument("--preset", default="tiny", help="named configuration (default: tiny)")
    schedule.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any field of config.json")
    schedule.add_argument("--out", type=Path, default=Path("schedule.png"), help="picture to write (schedule.png)")

    data = commands.add_parser("data", help="write data sets")
    sets = data.add_subparsers(dest="set", required=True, metavar="digits")
    digits = sets.add_parser("digits", parents=[common], help="crowded digits as a COCO folder")
    digits.set_defaults(run=_write_digits)
    digits.add_argument("out", type=Path)
    digits.add_argument("--seed", type=int, default=0)
    digits.add_argument("--train-images", type=int, default=2000)
    digits.add_argument("--val-images", type=int, default=100)
    digits.add_argument("--image-size", type=int, default=128)
    return top


def _add_run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("trained", metavar="RUN", help="run folder, name of a run below runs/, or checkpoint file")
    command.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which one of the run (best)")


def _add_data_options(command: argparse.ArgumentParser, splits: Sequence[str], otherwise: str) -> None:
    command.add_argument("--data", type=Path, metavar="ROOT", help=f"COCO folder; {otherwise}")
    for split in splits:
        command.add_argument(f"--{split}-json", type=Path, help=f"annotation file of the {split} set")
        command.add_argument(f"--{split}-images", type=Path, help=f"image folder of the {split} set")


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
    import torch

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
    from route_detr.data import coco_layout

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


def _train(args: argparse.Namespace) -> int:
    from route_detr.plots import plot_curves
    from route_detr.run import Run

    if args.name and args.out:
        raise UsageError("--name and --out: expected one of them, got both")
    run = Run(args.out or Path("runs") / (args.name or args.preset or "tiny"))
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
    from route_detr.config import preset
    from route_detr.data import write_digits
    from route_detr.training import Training

    run.check_new()
    name = args.preset or "tiny"
    changes = _overrides(args)
    config = _updated(preset(name), changes)
    device = _device(args)
    paths = _data_paths(args, ("train", "val"))
    if paths is None:
        if not Path(BUNDLED_DATA).is_dir():
            write_digits(BUNDLED_DATA)
        args.data = Path(BUNDLED_DATA)
        paths = _data_paths(args, ("train", "val"))
    training = Training(run, config, paths, device, preset=name)
    classes = training.config.detector.num_classes
    if changes.get("detector.num_classes", ("", classes))[1] != classes:
        raise UsageError(f"--set detector.num_classes: the data set has {classes} categories")
    training.start()
    return training


def _resumed(args: argparse.Namespace, run: Run) -> Training:
    from route_detr.checkpoint import load_checkpoint
    from route_detr.config import Config
    from route_detr.training import Training

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
    from route_detr.plots import plot_detections, plot_routing
    from route_detr.prediction import detection_examples, load_trained

    trained = load_trained(run.best, device)
    examples = detection_examples(trained, val_set, range(min(PICTURES, len(val_set))), SHOWN_SCORE)
    plot_detections(examples, trained.category_names, run.folder / "detections.png")
    if not trained.config.detector.route:
        return ["detections.png"]
    plot_routing(val_set.raw_image(0), trained.routing(val_set.raw_image(0)), run.folder / "routing.png")
    return ["detections.png", "routing.png"]


def _load(args: argparse.Namespace) -> tuple[Path, Trained]:
    from route_detr.prediction import load_trained
    from route_detr.run import find_checkpoint

    path = find_checkpoint(args.trained, args.checkpoint)
    return path, load_trained(path, _device(args))


def _val_set(paths: dict[str, str], trained: Trained) -> CocoDetection:
    from route_detr.data import CocoDetection, eval_transforms

    transforms = eval_transforms(trained.config.transforms)
    dataset = CocoDetection(paths["val_json"], paths["val_images"], transforms)
    known = dict(zip(trained.category_ids, trained.category_names, strict=True))
    for number, name in zip(dataset.category_ids, dataset.category_names, strict=True):
        if known.get(number) != name:
            raise UsageError(
                f"{paths['val_json']}: category {number} is {name!r}, for the detector {known.get(number, 'unknown')!r}"
            )
    return dataset


def _evaluate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from route_detr.checkpoint import write_text
    from route_detr.engine import evaluate
    from route_detr.evaluation import table

    checkpoint, trained = _load(args)
    paths = _data_paths(args, ("val",)) or trained.data
    dataset = _val_set(paths, trained)
    with tqdm(total=len(dataset), unit="image", desc="evaluating", leave=False) as bar:
        metrics = evaluate(
            *(trained.detector, dataset, trained.config.train, trained.device, trained.category_ids),
            after_batch=lambda images: bar.update(images - bar.n),
        )
    print(table(metrics))
    out = args.out or checkpoint.with_name(f"eval-{checkpoint.stem}.json")
    record = {"checkpoint": str(checkpoint), "annotations": paths["val_json"], "images": len(dataset), **metrics}
    write_text(out, json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")
    return 0


def _predict(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from route_detr.data.images import header_size
    from route_detr.prediction import image_files, predict_files

    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"--score-threshold: expected a number in 0..1, got {args.score_threshold}")
    files = image_files(args.images)
    for file in files:
        header_size(file)  # a file that is no image is told before any work is done
    _, trained = _load(args)
    pictures = predict_files(trained, files, args.out, args.score_threshold)
    count = sum(1 for _ in tqdm(pictures, total=len(files), unit="image", leave=False))
    print(f"{count} pictures and predictions.json written to {args.out}")
    return 0


def _inspect_routing(args: argparse.Namespace) -> int:
    from route_detr.data import read_rgb
    from route_detr.plots import plot_routing

    checkpoint, trained = _load(args)
    if not trained.config.detector.route:
        raise UsageError(f"{checkpoint}: trained with --no-route, it has no routing to show")
    image = read_rgb(args.image) if args.image else _val_set(trained.data, trained).raw_image(0)
    out = args.out or checkpoint.with_name("routing.png")
    plot_routing(image, trained.routing(image), out)
    print(f"written to {out}")
    return 0


def _inspect_schedule(args: argparse.Namespace) -> int:
    from route_detr.config import preset
    from route_detr.plots import plot_schedule

    plot_schedule(_updated(preset(args.preset), _overrides(args)).train, args.out)
    print(f"written to {args.out}")
    return 0


def _write_digits(args: argparse.Namespace) -> int:
    from route_detr.data import write_digits

    sizes = {name: getattr(args, name) for name in ("seed", "train_images", "val_images", "image_size")}
    written = write_digits(args.out, **sizes)
    print(f"{'written to' if written else 'already in'} {args.out}")
    return 0


def _complain(kind: str, message: object) -> None:
    lines = (line.strip() for line in str(message).splitlines())
    print(f"route-detr: {kind}: {'; '.join(line for line in lines if line)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where, **more: _complain("warning", message)
        try:
            return args.run(args)
        except Interrupted as stop:
            folder = args.out or Path("runs") / (args.name or args.preset or "tiny")
            print(f"route-detr: {stop}; continue with: route-detr train --resume --out {folder}", file=sys.stderr)
            return stop.exit_code
        except KeyboardInterrupt:
            print("route-detr: interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if args.debug:
                raise
            bad_input = isinstance(error, INPUT_ERRORS)
            text = str(error) if bad_input or isinstance(error, NonFiniteLoss) else f"{type(error).__name__}: {error}"
            _complain("error", text)
            return BAD_INPUT if bad_input else FAILED
