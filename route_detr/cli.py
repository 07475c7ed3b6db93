"""route-detr train | eval | predict | import | export | inspect | data | memory."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from route_detr.errors import Interrupted, RunFailed, WriteError
from route_detr.memory import command as memory

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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="route-detr", description="Train and use a routed detector (Route-DETR).")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    computing = argparse.ArgumentParser(add_help=False)
    computing.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto: cuda where there is one")
    computing.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        *("train",),
        parents=[common, computing],
        help="train a detector",
        description="Train a detector on data in COCO's format; without --data, on bundled digits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(action="train")
    _add_data_options(train, ("train", "val"), "without any: the bundled crowded digits, written to data/digits once")
    train.add_argument(
        "--name", help="name of the run: its folder is runs/NAME (default: that of the preset or of the --config file)"
    )
    train.add_argument("--out", type=Path, help="the run's folder, instead of runs/NAME")
    train.add_argument("--cache", type=Path, metavar="FOLDER", help="keep decoded training images there")
    train.add_argument(
        "--init",
        metavar="RUN",
        help="begin with the weights of this run or checkpoint file, and without --preset with its configuration",
    )
    train.add_argument(
        "--init-partial", action="store_true", help="what does not fit of --init begins anew, instead of an error"
    )
    train.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
    _add_configuration(train)

    evaluate = commands.add_parser("eval", parents=[common, computing], help="average precision of a trained detector")
    evaluate.set_defaults(action="evaluate")
    _add_run_argument(evaluate)
    _add_data_options(evaluate, ("val",), "default: the validation set of the run")
    evaluate.add_argument("--out", type=Path, help="JSON file (default: eval-CHECKPOINT.json in the run)")

    predict = commands.add_parser("predict", parents=[common, computing], help="find objects in image files")
    predict.set_defaults(action="predict")
    _add_run_argument(predict)
    predict.add_argument("images", nargs="+", help="image files, or folders of images")
    predict.add_argument("--out", type=Path, required=True, help="folder for the pictures and predictions.json")
    predict.add_argument("--score-threshold", type=float, default=0.3, help="leave out less certain detections (0.3)")

    importing = commands.add_parser(
        "import",
        parents=[common],
        help="a public checkpoint as one of ours",
        description="Turn weights of Deformable DETR, Dual-R-DETR or DINO (as their authors publish them, or of "
        "transformers) into a checkpoint that eval, predict, export and train --init read.",
    )
    importing.set_defaults(action="import_weights")
    importing.add_argument("source", help="file of the authors, folder of a transformers model, or its name on the hub")
    importing.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    importing.add_argument(
        "--categories", type=Path, metavar="COCO.json", help="annotation file that names the classes by their numbers"
    )
    _add_configuration(importing, "the one that the weights were trained with")

    export = commands.add_parser("export", parents=[common], help="a trained detector as ONNX or torch.export file")
    export.set_defaults(action="export")
    _add_run_argument(export)
    export.add_argument("--out", type=Path, required=True, help="file to write: NAME.onnx or NAME.pt2")
    export.add_argument(
        *("--size",), type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images (default: square, as trained)"
    )

    inspect = commands.add_parser("inspect", help="pictures of what routing does")
    topics = inspect.add_subparsers(dest="topic", required=True, metavar="routing | schedule")
    routing = topics.add_parser("routing", parents=[common, computing], help="learned bias and gate of one image")
    routing.set_defaults(action="inspect_routing")
    _add_run_argument(routing)
    routing.add_argument("--image", type=Path, help="image file (default: the first validation image of the run)")
    routing.add_argument("--out", type=Path, help="picture to write (default: routing.png beside the checkpoint)")
    schedule = topics.add_parser("schedule", parents=[common], help="lambda(t), alpha(t) and the learning rate")
    schedule.set_defaults(action="inspect_schedule")
    schedule.add_argument("--images", type=int, default=118_287, help="images of an epoch (118287: COCO train2017)")
    schedule.add_argument("--out", type=Path, default=Path("schedule.png"), help="picture to write (schedule.png)")
    _add_configuration(schedule)

    data = commands.add_parser("data", help="check a data set, write one")
    sets = data.add_subparsers(dest="set", required=True, metavar="check | digits | cityscapes")
    check = sets.add_parser(
        *("check",),
        parents=[common],
        help="read all of a data set: sizes, classes, crowding, faults",
        description="Read every annotation and every picture, and tell what is there and what is wrong with it. "
        "Exit code 0: it can be trained on; 1: it cannot.",
    )
    check.set_defaults(action="check_data")
    check.add_argument("data", nargs="?", type=Path, metavar="ROOT", help="COCO folder")
    _add_split_options(check, ("train", "val"))
    check.add_argument("--masks", action="store_true", help="every object needs a segmentation")
    check.add_argument("--workers", type=int, help="processes that read pictures (default: one a CPU)")
    check.add_argument("--json", type=Path, metavar="FILE", help="write all of it, every example too")
    digits = sets.add_parser("digits", parents=[common], help="crowded digits as a COCO folder")
    digits.set_defaults(action="write_digits")
    digits.add_argument("out", type=Path)
    digits.add_argument("--seed", type=int, default=0)
    digits.add_argument("--train-images", type=int, default=5000)
    digits.add_argument("--val-images", type=int, default=100)
    digits.add_argument("--image-size", type=int, default=128)
    cityscapes = sets.add_parser(
        "cityscapes", parents=[common], help="the official Cityscapes folders as a COCO folder"
    )
    cityscapes.set_defaults(action="write_cityscapes")
    cityscapes.add_argument("root", type=Path, help="folder with leftImg8bit/ and gtFine/")
    cityscapes.add_argument("out", type=Path)
    cityscapes.add_argument("--workers", type=int, help="processes (default: one a CPU)")

    memory.add_parser(commands, common)
    return top


def _add_configuration(command: argparse.ArgumentParser, default: str = "tiny") -> None:
    group = command.add_argument_group(
        "configuration", "a preset or a file, and what overrides it; config.json of a run has all fields"
    )
    group.add_argument("--preset", help=f"named configuration to start from (default: {default})")
    group.add_argument("--config", type=Path, metavar="FILE.yaml", help="fields that differ from its `base`, a preset")
    group.add_argument("--route", action=argparse.BooleanOptionalAction, help="--no-route trains the plain baseline")
    group.add_argument("--routed-layers", metavar="LAYERS", help="decoder layers with routing: last:2, all or 3,4")
    group.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any field, as train.learning_rate=2e-4")


def _add_run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("trained", metavar="RUN", help="run folder, name of a run below runs/, or checkpoint file")
    command.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which one of the run (best)")


def _add_data_options(command: argparse.ArgumentParser, splits: Sequence[str], otherwise: str) -> None:
    command.add_argument("--data", type=Path, metavar="ROOT", help=f"COCO folder; {otherwise}")
    _add_split_options(command, splits)


def _add_split_options(command: argparse.ArgumentParser, splits: Sequence[str]) -> None:
    for split in splits:
        command.add_argument(f"--{split}-json", type=Path, help=f"annotation file of the {split} set")
        command.add_argument(f"--{split}-images", type=Path, help=f"image folder of the {split} set")


def run_folder(args: argparse.Namespace) -> Path:
    """The run's folder: as --out says, or below runs/ by --name, the preset's name, --config's or --init's."""
    if args.out:
        return args.out
    began = args.preset or (args.config.stem if args.config else "tiny")
    if args.init and not args.preset and not args.config:
        file = Path(args.init)
        began = (file.parent if file.name in ("best.pt", "last.pt") else file).name.removesuffix(".pt") + "-finetune"
    return Path("runs") / (args.name or began)


def _how_to_resume(args: argparse.Namespace) -> str:
    return f"continue with: route-detr train --resume --out {run_folder(args)}"


def _complain(kind: str, message: object) -> None:
    lines = (line.strip() for line in str(message).splitlines())
    sentence = "; ".join(line for line in lines if line).replace(":; ", ": ")
    with suppress(OSError):  # the terminal has gone (SIGHUP): nobody is left to be told
        tqdm.write(f"route-detr: {kind}: {sentence}", file=sys.stderr)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; KEY=VALUE may stand anywhere in it."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if hasattr(args, "overrides"):
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 130 when interrupted."""
    args = parsed(argv)
    # Read once, when PyTorch loads OpenMP: threads that wait spin some 50 us, then sleep. By default they spin for
    # milliseconds, and one other process on the machine then makes a training step many times as slow.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where, **more: _complain("warning", message)
        try:
            from route_detr import commands  # here: --help need not wait for PyTorch

            return getattr(commands, args.action)(args)
        except Interrupted as stop:
            _complain("stopped", f"{stop}; {_how_to_resume(args)}")
            return stop.exit_code
        except KeyboardInterrupt:
            in_a_run = args.command == "train" and (run_folder(args) / "last.pt").exists()
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
