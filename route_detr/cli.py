"""route-detr train | eval | predict | import | export | inspect | compare | data | memory, parsers beside functions.

A command imports what it needs when it runs, so that ``--help`` does not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from route_detr.errors import Interrupted, RunError, RunFailed, UsageError, WriteError
from route_detr.files import SOFTWARE, check_replaceable, with_folder, write_text
from route_detr.memory import command as memory

if TYPE_CHECKING:
    from accelerate import Accelerator

    from route_detr.config import Config
    from route_detr.data.coco import CocoDetection
    from route_detr.predict import Trained
    from route_detr.run import Run
    from route_detr.train import Training

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
FAILURES = (RunFailed, WriteError, FloatingPointError)  # whose message is a sentence
INPUT_ERRORS = (
    *(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError),
)
EXAMPLES = """examples:
  route-detr train                                       the tiny preset on handwritten digits, nothing else needed
  route-detr train --data ROOT --preset dino-r50 detector.backbone.weights=microsoft/resnet-50
  route-detr train --data ROOT --no-route train.epochs=24 train.batch_size=8
  route-detr train --resume                              goes on where the run was stopped
  accelerate launch --mixed_precision bf16 -m route_detr train --data ROOT     on all GPUs of this machine
"""
COMPARISONS = """examples:
  route-detr compare --seeds 5 --steps 1250 --jobs 2
  route-detr compare --data ROOT --preset tiny train.batch_size=16 --seconds 3600 --arm plain --arm all-layers
  route-detr compare --steps 2000 --arm plain detector.route=false --arm strong schedule.strength=1 --arm frozen
"""
BUNDLED_DATA = "data/digits"
DATA_OPTIONS = ("train_json", "train_images", "val_json", "val_images")
LENGTHS = ("train.epochs", "train.time_budget")
RESUMABLE = (*LENGTHS, "train.workers", "train.accumulate")  # what may change when a run is resumed
PICTURES, SHOWN_SCORE = 4, 0.3
CURVES_EVERY_SECONDS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 130 when interrupted."""
    args = parsed(argv)
    # Read once, when PyTorch loads OpenMP: threads that wait spin some 50 us, then sleep. By default they spin for
    # milliseconds, and one other process on the machine then makes a training step many times as slow.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where, **more: _complain("warning", message)
        try:
            return args.action(args)
        except Interrupted as stop:
            _complain("stopped", f"{stop}; {_how_to_resume(args)}")
            return stop.exit_code
        except KeyboardInterrupt:
            in_a_run = args.action is train and (run_folder(args) / "last.pt").exists()
            _complain("stopped", f"the last checkpoint stands; {_how_to_resume(args)}" if in_a_run else "by Ctrl-C")
            return INTERRUPTED
        except Exception as error:
            if args.debug:
                raise
            bad_input = isinstance(error, INPUT_ERRORS)
            text = str(error) if bad_input or isinstance(error, FAILURES) else f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.strerror is not None:
                text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            _complain("error", text)
            return BAD_INPUT if bad_input else FAILED


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with its function as ``action``; KEY=VALUE may stand anywhere in it."""
    top = argparse.ArgumentParser(prog="route-detr", description="Train and use a routed detector (Route-DETR).")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = (_add_train, _add_evaluate, _add_predict, _add_import, _add_export, _add_inspect, _add_compare, _add_data)
    for add in adders:
        add(commands)
    memory.add_parser(commands, _common())
    args, rest = top.parse_known_args(argv)
    if hasattr(args, "overrides"):
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _common(computes: bool = False) -> argparse.ArgumentParser:
    """Options of all commands, or of those that compute."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if computes:
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto: cuda where there is one")
        parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    return parser


def _add(
    commands: argparse._SubParsersAction,
    name: str,
    action: Callable[[argparse.Namespace], int],
    help: str,
    computes: bool = False,
    **more: Any,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, parents=[_common(computes)], help=help, **more)
    command.set_defaults(action=action)
    return command


def _complain(kind: str, message: object) -> None:
    lines = (line.strip() for line in str(message).splitlines())
    sentence = "; ".join(line for line in lines if line).replace(":; ", ": ")
    with suppress(OSError):  # the terminal has gone (SIGHUP): nobody is left to be told
        tqdm.write(f"route-detr: {kind}: {sentence}", file=sys.stderr)


def _how_to_resume(args: argparse.Namespace) -> str:
    if args.action is compare:
        return "the same command goes on"
    return f"continue with: route-detr train --resume --out {run_folder(args)}"


# ---- what several commands are told ----------------------------------------------------------------------------------


def _add_configuration(command: argparse.ArgumentParser, default: str = "tiny") -> None:
    group = command.add_argument_group(
        "configuration", "a preset or a file, and what overrides it; config.json of a run has all fields"
    )
    group.add_argument("--preset", help=f"named configuration to start from (default: {default})")
    group.add_argument("--config", type=Path, metavar="FILE.yaml", help="fields that differ from its `base`, a preset")
    group.add_argument("--route", action=argparse.BooleanOptionalAction, help="--no-route trains the plain baseline")
    group.add_argument("--routed-layers", metavar="LAYERS", help="decoder layers with routing: last:2, all or 3,4")
    group.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field, as train.learning_rate=2e-4")


def _configured(args: argparse.Namespace) -> tuple[str, Config]:
    """The name of the preset or the file to start from, and the configuration with what overrides it."""
    from route_detr.config import load_config, preset

    if args.preset and args.config:
        raise UsageError("--preset and --config: expected one of them, got both (a file names its preset as `base`)")
    name = str(args.config or args.preset or "tiny")
    return name, (load_config(name) if args.config else preset(name)).updated(_overrides(args))


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value for all that the command line says of single fields."""
    import yaml

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


def _check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raise `UsageError` for an option that is given and is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


def _check_score_threshold(args: argparse.Namespace) -> None:
    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"--score-threshold: expected a number in 0..1, got {args.score_threshold}")


def _processes(args: argparse.Namespace) -> Accelerator:
    import torch

    from route_detr.scale_out import start_processes

    _check_numbers(args, "threads")
    accelerator = start_processes(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return accelerator


def _add_data_options(command: argparse.ArgumentParser, splits: Sequence[str], otherwise: str) -> None:
    command.add_argument("--data", type=Path, metavar="ROOT", help=f"COCO folder; {otherwise}")
    _add_split_options(command, splits)


def _add_split_options(command: argparse.ArgumentParser, splits: Sequence[str]) -> None:
    for split in splits:
        command.add_argument(f"--{split}-json", type=Path, help=f"annotation file of the {split} set")
        command.add_argument(f"--{split}-images", type=Path, help=f"image folder of the {split} set")


def _data_paths(args: argparse.Namespace, splits: Sequence[str]) -> dict[str, str] | None:
    """The data's absolute paths that the command line gives; None when it gives none."""
    from route_detr.data.coco import coco_layout

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


def _data_or_digits(args: argparse.Namespace) -> dict[str, str]:
    """`_data_paths` of both splits; the bundled digits, written once, where the command line says nothing."""
    from route_detr.tools import digits

    paths = _data_paths(args, ("train", "val"))
    if paths is None:
        if not Path(BUNDLED_DATA).is_dir():
            digits.write_digits(BUNDLED_DATA)
        args.data = Path(BUNDLED_DATA)
        paths = _data_paths(args, ("train", "val"))
    return paths


def _add_run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("trained", metavar="RUN", help="run folder, name of a run below runs/, or checkpoint file")
    command.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which one of the run (best)")


def _checkpoint(args: argparse.Namespace) -> Path:
    from route_detr.run import find_checkpoint

    return find_checkpoint(args.trained, args.checkpoint)


def _val_set(paths: dict[str, str], trained: Trained, option: str) -> CocoDetection:
    """``option`` gives what is asked for where the checkpoint knows of no data."""
    from route_detr.data.coco import CocoDetection

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


# ---- train -----------------------------------------------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction) -> None:
    command = _add(
        *(commands, "train", train, "train a detector"),
        computes=True,
        description="Train a detector on data in COCO's format; without --data, on bundled digits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data_options(command, ("train", "val"), "without any: the bundled crowded digits, written to data/digits once")
    command.add_argument(
        "--name", help="name of the run: its folder is runs/NAME (default: that of the preset or of the --config file)"
    )
    command.add_argument("--out", type=Path, help="the run's folder, instead of runs/NAME")
    command.add_argument("--cache", type=Path, metavar="FOLDER", help="keep decoded training images there")
    command.add_argument(
        "--init",
        metavar="RUN",
        help="begin with the weights of this run or checkpoint file, and without --preset with its configuration",
    )
    command.add_argument(
        "--init-partial", action="store_true", help="what does not fit of --init begins anew, instead of an error"
    )
    command.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
    _add_configuration(command)


def train(args: argparse.Namespace) -> int:
    from route_detr.run import Run
    from route_detr.tools import plots

    if args.name and args.out:
        raise UsageError("--name and --out: expected one of them, got both")
    run = Run(run_folder(args), writes=int(os.environ.get("RANK", 0)) == 0)

    def draw_curves() -> list[str]:
        return run.draw("curves.png", lambda path: plots.plot_curves(run.records(), path))

    try:
        training = _resumed(args, run) if args.resume else _started(args, run)
        training.fit(after_evaluation=_at_most_every(CURVES_EVERY_SECONDS, draw_curves))
        if run.writes:
            print(training.summary())
            pictures = draw_curves() + _draw(run, training)
    finally:
        run.close()
    if run.writes:
        print(f"files in {run.folder}: {', '.join(['metrics.jsonl', 'config.json', 'best.pt', 'last.pt', *pictures])}")
    training.accelerator.end_training()
    return 0


def run_folder(args: argparse.Namespace) -> Path:
    """The run's folder: as --out says, or below runs/ by --name, the preset's name, --config's or --init's."""
    if args.out:
        return args.out
    began = args.preset or (args.config.stem if args.config else "tiny")
    if args.init and not args.preset and not args.config:
        file = Path(args.init)
        began = (file.parent if file.name in ("best.pt", "last.pt") else file).name.removesuffix(".pt") + "-finetune"
    return Path("runs") / (args.name or began)


def _at_most_every(seconds: float, call: Callable[[], object]) -> Callable[[], None]:
    last = -math.inf

    def called() -> None:
        nonlocal last
        if perf_counter() - last > seconds:
            call()
            last = perf_counter()

    return called


def _started(args: argparse.Namespace, run: Run) -> Training:
    from route_detr.config import load_config
    from route_detr.run import find_checkpoint, load_checkpoint
    from route_detr.scale_out import take_weights
    from route_detr.train import Training

    if args.init_partial and not args.init:
        raise UsageError("--init-partial: expected with --init RUN, got none")
    run.check_new()
    checkpoint = find_checkpoint(args.init) if args.init else None
    init = None if checkpoint is None else load_checkpoint(checkpoint)
    name, config = _configured(args) if init is None else _configured_by(args, checkpoint, init)
    accelerator = _processes(args)
    with accelerator.local_main_process_first():
        paths = _data_or_digits(args)
    backbone_is_read = config.detector.backbone.weights is not None and (init is None or args.init_partial)
    training = Training(
        *(run, config, paths, accelerator),
        preset=name,
        base=load_config(args.config) if args.config else None,
        cache=args.cache,
        weights_follow=init is not None and not backbone_is_read,
    )
    classes = training.config.detector.num_classes
    if _overrides(args).get("detector.num_classes", classes) != classes:
        raise UsageError(f"detector.num_classes: the data set has {classes} categories")
    if init is not None:
        told = take_weights(training.detector, checkpoint, init, training.train_set.category_names, args.init_partial)
        if run.writes:
            print(told)
    training.start()
    return training


def _configured_by(args: argparse.Namespace, checkpoint: Path, init: dict[str, Any]) -> tuple[str, Config]:
    """`_configured`; without --preset and --config, what the checkpoint to begin with was trained with."""
    from route_detr.predict import stored_config

    if args.preset or args.config:
        return _configured(args)
    return init.get("preset", str(checkpoint)), stored_config(init, checkpoint).updated(_overrides(args))


def _resumed(args: argparse.Namespace, run: Run) -> Training:
    from route_detr.run import load_checkpoint
    from route_detr.train import Training

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
    from route_detr.config import Config, load_config
    from route_detr.predict import stored_config

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
    import torch

    from route_detr.predict import load_trained
    from route_detr.tools import plots

    val_set, detector = training.val_set, training.config.detector
    best = cache(lambda: load_trained(run.best, training.accelerator.device))

    def draw_detections(path: Path) -> None:
        images = [val_set.raw_image(index) for index in range(min(PICTURES, len(val_set)))]
        truths = [{"boxes": val_set.boxes(index), "labels": val_set.labels(index)} for index in range(len(images))]
        if detector.masks:
            for index, truth in enumerate(truths):
                truth["masks"] = torch.from_numpy(val_set.masks(index)).permute(2, 0, 1).bool()
        found = [best().detect(image, SHOWN_SCORE) for image in images]
        plots.plot_detections(images, truths, found, best().category_names, path)

    def draw_routing(path: Path) -> None:
        image = val_set.raw_image(0)
        plots.plot_routing(image, best().routing(image), path)

    drawn = run.draw("detections.png", draw_detections)
    return drawn + (run.draw("routing.png", draw_routing) if detector.route else [])


# ---- eval, predict ---------------------------------------------------------------------------------------------------


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "eval", evaluate, "average precision of a trained detector", computes=True)
    _add_run_argument(command)
    _add_data_options(command, ("val",), "default: the validation set of the run")
    command.add_argument("--out", type=Path, help="JSON file (default: eval-CHECKPOINT.json in the run)")


def evaluate(args: argparse.Namespace) -> int:
    from route_detr import evaluation
    from route_detr.data.batches import killed_worker
    from route_detr.predict import load_trained

    checkpoint = _checkpoint(args)
    out = args.out or checkpoint.with_name(f"eval-{checkpoint.stem}.json")
    check_replaceable("JSON", out)
    accelerator = _processes(args)
    trained = load_trained(checkpoint, accelerator.device)
    paths = _data_paths(args, ("val",)) or trained.data
    dataset = _val_set(paths, trained, "--data ROOT, or --val-json and --val-images")
    main = accelerator.is_main_process
    with tqdm(total=len(dataset), unit="image", desc="evaluating", leave=False, disable=None if main else True) as bar:
        try:
            metrics = evaluation.evaluate(
                *(trained.detector, dataset, trained.config.train, accelerator, trained.category_ids),
                after_batch=lambda images: bar.update(images * accelerator.num_processes - bar.n),
            )
        except RuntimeError as error:
            if (why := killed_worker(error)) is None:
                raise
            raise RunFailed(why) from error
    if main:
        print(evaluation.table(metrics))
        record = {"software": SOFTWARE, "checkpoint": str(checkpoint), "annotations": paths["val_json"]}
        record |= {"images": len(dataset), **metrics}
        write_text(with_folder(out), json.dumps(record, indent=2) + "\n")
        print(f"written to {out}")
    accelerator.end_training()
    return 0


def _add_predict(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "predict", predict, "find objects in image files", computes=True)
    _add_run_argument(command)
    command.add_argument("images", nargs="+", help="image files, or folders of images")
    command.add_argument("--out", type=Path, required=True, help="folder for the pictures and predictions.json")
    command.add_argument("--score-threshold", type=float, default=0.3, help="leave out less certain detections (0.3)")


def predict(args: argparse.Namespace) -> int:
    from route_detr.predict import PREDICTIONS, image_files, load_trained, pictures_of, predict_files

    _check_score_threshold(args)
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out: expected a folder, {args.out} is a file")
    for given in args.images:
        if args.out.exists() and os.path.isdir(given) and args.out.samefile(given):
            raise UsageError(f"--out: expected another folder than that of the images, got {args.out}")
    files = image_files(args.images)
    check_replaceable("predictions", args.out / PREDICTIONS)
    check_replaceable("picture", *pictures_of(files, args.out))
    trained = load_trained(_checkpoint(args), _processes(args).device)
    with closing(predict_files(trained, files, args.out, args.score_threshold)) as prediction:
        done = tqdm(prediction, total=len(files), unit="image", leave=False, disable=None)
        unread = [str(error) for error in done if error is not None]
    print(f"{len(files) - len(unread)} pictures and {PREDICTIONS} written to {args.out}")
    if unread:
        raise RunFailed(f"{len(unread)} of {len(files)} images: {'; '.join(unread)}")
    return 0


# ---- import, export --------------------------------------------------------------------------------------------------


def _add_import(commands: argparse._SubParsersAction) -> None:
    command = _add(
        *(commands, "import", import_weights, "a public checkpoint as one of ours"),
        description="Turn weights of Deformable DETR, Dual-R-DETR or DINO (as their authors publish them, or of "
        "transformers) into a checkpoint that eval, predict, export and train --init read.",
    )
    command.add_argument("source", help="file of the authors, folder of a transformers model, or its name on the hub")
    command.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    command.add_argument(
        "--categories", type=Path, metavar="COCO.json", help="annotation file that names the classes by their numbers"
    )
    _add_configuration(command, "the one that the weights were trained with")


def import_weights(args: argparse.Namespace) -> int:
    from route_detr.run import save_checkpoint
    from route_detr.tools.importing import imported, read_published

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


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "export", export, "a trained detector as ONNX or torch.export file")
    _add_run_argument(command)
    command.add_argument("--out", type=Path, required=True, help="file to write: NAME.onnx or NAME.pt2")
    command.add_argument(
        *("--size",), type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images (default: square, as trained)"
    )


def export(args: argparse.Namespace) -> int:
    from route_detr.predict import load_trained
    from route_detr.tools import export

    print(export.export(load_trained(_checkpoint(args)), args.out, args.size))
    return 0


# ---- inspect ---------------------------------------------------------------------------------------------------------


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser("inspect", help="what routing does, and how queries compete")
    topics = inspect.add_subparsers(dest="topic", required=True, metavar="routing | schedule | competition")
    routing = _add(topics, "routing", inspect_routing, "learned bias and gate of one image", computes=True)
    _add_run_argument(routing)
    routing.add_argument("--image", type=Path, help="image file (default: the first validation image of the run)")
    routing.add_argument("--out", type=Path, help="picture to write (default: routing.png beside the checkpoint)")
    schedule = _add(topics, "schedule", inspect_schedule, "lambda(t), alpha(t) and the learning rate")
    schedule.add_argument("--images", type=int, default=118_287, help="images of an epoch (118287: COCO train2017)")
    schedule.add_argument("--out", type=Path, default=Path("schedule.png"), help="picture to write (schedule.png)")
    _add_configuration(schedule)
    purpose = "how queries compete for objects, over the whole validation set"
    competition = _add(topics, "competition", inspect_competition, purpose, computes=True)
    _add_run_argument(competition)
    _add_data_options(competition, ("val",), "default: the validation set of the run")
    competition.add_argument("--out", type=Path, help="JSON to write (default: competition.json beside the checkpoint)")
    competition.add_argument(
        "--score-threshold", type=float, default=SHOWN_SCORE, help="of a query that claims an object (0.3)"
    )


def inspect_routing(args: argparse.Namespace) -> int:
    from route_detr.data.images import read_rgb
    from route_detr.predict import load_trained
    from route_detr.tools.plots import plot_routing

    checkpoint = _checkpoint(args)
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
    from route_detr.tools.plots import plot_schedule

    _check_numbers(args, "images")
    check_replaceable("picture", args.out)
    _, config = _configured(args)
    plot_schedule(config, -(-args.images // config.train.batch_size), with_folder(args.out))
    print(f"written to {args.out}")
    return 0


def inspect_competition(args: argparse.Namespace) -> int:
    from route_detr.compare.competition import as_text, measure
    from route_detr.predict import load_trained

    _check_score_threshold(args)
    checkpoint = _checkpoint(args)
    out = args.out or checkpoint.with_name("competition.json")
    check_replaceable("JSON", out)
    trained = load_trained(checkpoint, _processes(args).device)
    paths = _data_paths(args, ("val",)) or trained.data
    dataset = _val_set(paths, trained, "--data ROOT, or --val-json and --val-images")
    with tqdm(total=len(dataset), unit="image", desc="measuring", leave=False, disable=None) as bar:
        measures, _ = measure(trained, dataset, args.score_threshold, lambda images: bar.update(images - bar.n))
    print(as_text(measures))
    record = {"software": SOFTWARE, "checkpoint": str(checkpoint), "annotations": paths["val_json"], **measures}
    write_text(with_folder(out), json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")
    return 0


# ---- compare ---------------------------------------------------------------------------------------------------------


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = _add(
        *(commands, "compare", compare, "does an arm help on your data? paired runs, and an interval"),
        computes=True,
        description="Train every arm with every seed and say with an interval whether an arm helps. In one seed all "
        "arms see the same images, crops and noise and begin with the same numbers. Each run is an ordinary one, in "
        "runs/NAME/ARM-SEED; stopped or killed, the same command goes on. Without --arm: plain and routed.",
        epilog=COMPARISONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        *("--arm",), nargs="+", action="append", metavar=("NAME", "KEY=VALUE"),
        help="a name and what it changes; the first is what the others are compared with",
    )  # fmt: skip
    command.add_argument("--arms", type=Path, metavar="FILE.yaml", help="arms as NAME: {section: {field: value}}")
    command.add_argument("--seeds", type=int, default=5, metavar="N", help="0 to N - 1 of each arm (5)")
    length = command.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, metavar="N", help="of each run")
    length.add_argument("--seconds", type=float, metavar="S", help="of each run, its evaluations included")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (1)")
    command.add_argument("--name", default="compare", help="of the comparison: its folder is runs/NAME (compare)")
    _add_data_options(command, ("train", "val"), "without any: the bundled crowded digits")
    _add_configuration(command)


def compare(args: argparse.Namespace) -> int:
    """Every arm with every seed; what they show together goes into three files."""
    import torch

    from route_detr.compare import report
    from route_detr.compare.arms import parsed_arms
    from route_detr.compare.sitting import Member, Sitting, train_all
    from route_detr.tools.plots import plot_comparison

    _check_numbers(args, "seeds", "steps", "seconds", "jobs", "threads")
    arms, folder = parsed_arms(args.arm, args.arms), Path("runs") / args.name
    for kind, name in report.FILES.items():
        check_replaceable(kind, folder / name)
    _, config = _configured(args)
    length = {"train.steps": args.steps} if args.steps else {"train.time_budget": args.seconds, "train.epochs": 10**6}
    if args.steps and config.train.eval_steps is None:
        length["train.eval_steps"] = -(-args.steps // report.EVALUATIONS)
    changes = _overrides(args) | length
    sitting = Sitting(
        folder=folder,
        begins=[f"--config={args.config}"] if args.config else [f"--preset={args.preset or 'tiny'}"],
        changes=changes,
        base=config.updated(changes),
        data=_data_or_digits(args),
        device=str(_processes(args).device),
        jobs=args.jobs,
        threads=args.threads or max(1, (os.cpu_count() or 1) // args.jobs),
    )
    torch.set_num_threads(sitting.threads)
    members = [Member(sitting, arm, seed) for seed in range(args.seeds) for arm in arms]
    for member in members:
        member.check()
    train_all(members)
    found = report.analysed(sitting, arms, range(args.seeds))
    report.write(found, folder)
    plot_comparison(found, folder / report.FILES["picture"])
    print(report.as_markdown(found))
    print(f"files in {folder}: {', '.join(report.FILES.values())}")
    return 0


# ---- data ------------------------------------------------------------------------------------------------------------


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="check a data set, write one")
    sets = data.add_subparsers(dest="set", required=True, metavar="check | digits | scenes | cityscapes")
    check = _add(
        *(sets, "check", check_data, "read all of a data set: sizes, classes, crowding, faults"),
        description="Read every annotation and every picture, and tell what is there and what is wrong with it. "
        "Exit code 0: it can be trained on; 1: it cannot.",
    )
    check.add_argument("data", nargs="?", type=Path, metavar="ROOT", help="COCO folder")
    _add_split_options(check, ("train", "val"))
    check.add_argument("--masks", action="store_true", help="every object needs a segmentation")
    check.add_argument("--workers", type=int, help="processes that read pictures (default: one a CPU)")
    check.add_argument("--json", type=Path, metavar="FILE", help="write all of it, every example too")
    digits = _add(sets, "digits", write_digits, "crowded digits as a COCO folder")
    digits.add_argument("out", type=Path)
    for name, default in {"seed": 0, "train-images": 5000, "val-images": 100}.items():
        digits.add_argument(f"--{name}", type=int, default=default)
    digits.add_argument(
        *("--digits",), type=int, nargs=2, default=(5, 25), metavar=("LEAST", "MOST"), help="of an image (5 25)"
    )
    digits.add_argument(
        "--image-size", type=int, help="side (128 for 25 digits, larger for more: as much room for each)"
    )
    scenes = _add(sets, "scenes", write_scenes, "crowds in rendered rooms as a COCO folder (needs vizdoom)")
    scenes.add_argument("out", type=Path)
    for name, default in {"seed": 0, "train-images": 2000, "val-images": 200}.items():
        scenes.add_argument(f"--{name}", type=int, default=default)
    cityscapes = _add(sets, "cityscapes", write_cityscapes, "the official Cityscapes folders as a COCO folder")
    cityscapes.add_argument("root", type=Path, help="folder with leftImg8bit/ and gtFine/")
    cityscapes.add_argument("out", type=Path)
    cityscapes.add_argument("--workers", type=int, help="processes (default: one a CPU)")


def check_data(args: argparse.Namespace) -> int:
    from route_detr.data.check import as_text, check_data
    from route_detr.data.coco import coco_layout

    _check_numbers(args, "workers")
    if args.json is not None:
        check_replaceable("JSON", args.json)
    layout = coco_layout(args.data, **{option: getattr(args, option) for option in DATA_OPTIONS})
    found = check_data(layout, args.masks, args.workers)
    print(as_text(found))
    if args.json is not None:
        write_text(with_folder(args.json), json.dumps({"software": SOFTWARE, **found}, indent=1) + "\n")
        print(f"written to {args.json}")
    return 0 if found["trainable"] else 1


def write_digits(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from route_detr.config import first_error
    from route_detr.tools import digits

    sizes = {name: getattr(args, name) for name in ("seed", "train_images", "val_images")}
    side = digits.side_for(args.digits[1]) if args.image_size is None else args.image_size
    sizes |= {"digits_per_image": tuple(args.digits), "image_size": side}
    try:
        written = digits.write_digits(args.out, **sizes)
    except ValidationError as error:
        raise UsageError(first_error(error)) from error
    print(f"{'written to' if written else 'already in'} {args.out}")
    return 0


def write_scenes(args: argparse.Namespace) -> int:
    from route_detr.tools import scenes

    written = scenes.write_scenes(args.out, args.seed, args.train_images, args.val_images)
    print(f"{'written to' if written else 'already in'} {args.out}")
    return 0


def write_cityscapes(args: argparse.Namespace) -> int:
    from route_detr.tools import cityscapes

    _check_numbers(args, "workers")
    counts = cityscapes.write_cityscapes(args.root, args.out, args.workers)
    print(f"written to {args.out}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return 0
