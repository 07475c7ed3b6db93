"""route-detr train | eval | predict | inspect | data."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from route_detr.errors import Interrupted, NonFiniteLoss

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="route-detr", description="Train and use a routed detector (Route-DETR).")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    computing = argparse.ArgumentParser(add_help=False)
    computing.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto: cuda where there is one")
    computing.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    commands = top.add_subparsers(dest="command", required=True, metavar="train | eval | predict | inspect | data")

    train = commands.add_parser("train", parents=[common, computing], help="train a detector")
    train.set_defaults(action="train")
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

    inspect = commands.add_parser("inspect", help="pictures of what routing does")
    topics = inspect.add_subparsers(dest="topic", required=True, metavar="routing | schedule")
    routing = topics.add_parser("routing", parents=[common, computing], help="learned bias and gate of one image")
    routing.set_defaults(action="inspect_routing")
    _add_run_argument(routing)
    routing.add_argument("--image", type=Path, help="image file (default: the first validation image of the run)")
    routing.add_argument("--out", type=Path, help="picture to write (default: routing.png beside the checkpoint)")
    schedule = topics.add_parser("schedule", parents=[common], help="lambda(t) and alpha(t)")
    schedule.set_defaults(action="inspect_schedule")
    schedule.add_argument("--preset", default="tiny", help="named configuration (default: tiny)")
    schedule.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any field of config.json")
    schedule.add_argument("--out", type=Path, default=Path("schedule.png"), help="picture to write (schedule.png)")

    data = commands.add_parser("data", help="write data sets")
    sets = data.add_subparsers(dest="set", required=True, metavar="digits")
    digits = sets.add_parser("digits", parents=[common], help="crowded digits as a COCO folder")
    digits.set_defaults(action="write_digits")
    digits.add_argument("out", type=Path)
    digits.add_argument("--seed", type=int, default=0)
    digits.add_argument("--train-images", type=int, default=5000)
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


def run_folder(args: argparse.Namespace) -> Path:
    return args.out or Path("runs") / (args.name or args.preset or "tiny")


def _how_to_resume(args: argparse.Namespace) -> str:
    return f"continue with: route-detr train --resume --out {run_folder(args)}"


def _complain(kind: str, message: object) -> None:
    lines = (line.strip() for line in str(message).splitlines())
    print(f"route-detr: {kind}: {'; '.join(line for line in lines if line)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a run that failed, 2 for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
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
            text = str(error) if bad_input or isinstance(error, NonFiniteLoss) else f"{type(error).__name__}: {error}"
            _complain("error", text)
            return BAD_INPUT if bad_input else FAILED
