"""The commands of README and docs: each is understood and can be configured; slow tests run them, one after another.

A folder of a model that `transformers` writes, at random and small, stands in for what a command would download.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from markdown_pages import ROOT, blocks, commands
from PIL import Image
from small_training import SMALL, write_data
from test_cityscapes import picture
from test_importing import dino, random_state, small_transformers_model
from torch.distributed.run import get_args_parser
from transformers import ResNetConfig, ResNetModel, SwinConfig, SwinModel

import route_kernels.cli
from benchmarks import __main__ as door
from route_detr import cli
from route_detr.cli import main, parsed, run_folder
from route_detr.compare.arms import parsed_arms
from route_detr.config import preset
from route_detr.data.report import DatasetError
from route_detr.run import Run, load_checkpoint, save_checkpoint
from route_detr.tools.digits import write_digits
from route_detr.train import Training

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

CANNOT_RUN_HERE = {
    r"(accelerate|torchrun) (?!.*(--device cpu|accumulation)).*-m route_detr ": "needs GPUs: what it starts runs alone",
    r"(python|torchrun .*) -m route_kernels\.shim": "the reader's program: tests/test_shim.py runs one",
    r"python main\.py": "the reader's program",
    r"route-kernels doctor": "the reader's model: tests/test_doctor.py runs some",
    r"route-kernels tune": "needs a GPU",
    r"python -m benchmarks ": "measures for minutes: each has a test of its own",
    r"python -m pytest": "these tests",
    r"pytest benchmarks": "measures for minutes: tests/test_benchmarks.py runs some",
    r"(\S+=\S+ )?(pip install|(\.venv/bin/)?python setup\.py)": "sets up the environment that these tests run in",
    r"make ": "tests/test_readme.py knows the targets",
    r"export |for |done|compute-sanitizer": "the shell's, or needs a GPU",
}


def reason(words):
    """Why a command is not run as it stands, or None."""
    line = " ".join(words)
    return next((why for pattern, why in CANNOT_RUN_HERE.items() if re.match(pattern, line)), None)


def lines(page):
    return [[word for word in words if word != "..."] for words in commands(page.read_text())]


def started(words):
    """The words of `route-detr` that a launcher starts, and in how many processes; the launcher takes its options."""
    if words[0] == "accelerate":
        assert words[1] == "launch"
        options = launch_command_parser().parse_args(words[2:])
        processes = options.num_processes or 1
    elif words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        nodes, each = options.nnodes.partition(":")[0], options.nproc_per_node
        processes = int(nodes) * int(each) if each.isdecimal() else 1
    else:
        return (words[1:] if words[0] == "route-detr" else None), 1
    assert options.module
    return (options.training_script_args if options.training_script == "route_detr" else None), processes


COMMANDS = {f"{page.name}: {shlex.join(words)}": words for page in PAGES for words in lines(page)}
OURS = {name: words for name, words in COMMANDS.items() if started(words)[0] is not None}


class Understood(Exception):
    """Raised once a command line has been parsed, in place of what it does."""


@pytest.fixture
def only_parsed(monkeypatch):
    parse, depth = argparse.ArgumentParser.parse_known_args, []

    def parse_only(self, *arguments, **named):
        depth.append(1)
        try:
            found, rest = parse(self, *arguments, **named)
        finally:
            depth.pop()
        if depth:
            return found, rest
        assert not rest
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    # Some benchmarks leave Triton's interpreter for good, before they import the kernels; other tests need it.
    monkeypatch.setattr(os.environ, "pop", os.environ.get)


@pytest.mark.parametrize("name", [name for name, words in COMMANDS.items() if name not in OURS])
def test_other_commands_are_understood(name, only_parsed):
    words = COMMANDS[name]
    if words[:2] == ["route-kernels", "tune"]:
        entry, options = import_module("benchmarks.tune").main, words[2:]
    elif words[0] == "route-kernels":
        entry, options = route_kernels.cli.main, words[1:]
    elif words[:3] == ["python", "-m", "benchmarks"]:
        assert words[3:4] == [] or words[3] in door.COMMANDS
        entry, options = lambda options: door.main([words[3], *options]), words[4:]
    else:
        assert reason(words), "a command that no test knows"
        assert words[:2] != ["python", "-m"] or find_spec(words[2])
        return
    if options:
        with pytest.raises(Understood):
            entry(options)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """A folder with what the commands find beside them: models by their names on the hub, and files of the pages."""
    folder = tmp_path_factory.mktemp("downloads")
    ResNetConfig().save_pretrained(folder / "microsoft" / "resnet-50")
    SwinConfig().save_pretrained(folder / "microsoft" / "swin-large-patch4-window12-384-in22k")
    (mine,) = blocks("yaml", (ROOT / "docs" / "commands.md").read_text())
    (folder / "mine.yaml").write_text(mine)
    save_checkpoint(folder / "dino.pt", {"config": preset("dino-r50").to_dict(), "categories": [], "model": {}})
    return folder


@pytest.mark.parametrize("name", OURS)
def test_commands_of_the_detector_can_be_configured(name, downloads, monkeypatch):
    """All before the data: the detector is built, its fixed layers have weights, the processes share the batches."""
    monkeypatch.chdir(downloads)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, processes = started(OURS[name])
    args = parsed(words)
    if args.action is cli.train and not args.resume:
        init = args.init and load_checkpoint(args.init)
        _, config = cli._configured_by(args, Path(args.init), init) if init else cli._configured(args)
        with pytest.raises(DatasetError, match="no COCO data set found"):
            Training(Run("run"), config, {}, SimpleNamespace(num_processes=processes), weights_follow=bool(init))
    elif args.action is cli.inspect_schedule:
        cli._configured(args)
    elif args.action is cli.compare:
        for arm in parsed_arms(args.arm, args.arms):
            arm.config(cli._configured(args)[1], seed=0)
    elif args.action is cli.import_weights:
        assert not (args.preset or args.config or args.overrides)
    else:
        assert args.resume if args.action is cli.train else callable(args.action)


# ---- the commands run ------------------------------------------------------------------------------------------------

FEW_STEPS = {key: value for key, value in SMALL.items() if not key.startswith("detector.")} | {
    "train.epochs": 1,
    "train.batch_size": 4,
    "train.workers": 0,
    "train.mask_points": 64,
}
FOUR_STAGES = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
A_SMALL_DETECTOR = {key: value for key, value in SMALL.items() if key.startswith("detector.")}


def small(words):
    """The command with overrides that make it short, where it does not say those fields itself."""
    args = parsed(words)
    if args.action in (cli.write_digits, cli.write_scenes):
        return [*words, "--train-images", "4", "--val-images", "2"]
    if args.action is cli.compare:
        length = ["--seconds", "1"] if args.seconds else ["--steps", "2"]
        fields = [f"{key}={value}" for key, value in FEW_STEPS.items() if key != "train.epochs"]
        return ["compare", *fields, *words[1:], *length, "--seeds", "1"]
    if args.action is not cli.train or args.resume:
        return words
    pretrained = any(word.startswith("detector.backbone.weights=") for word in words) or args.config
    changes = dict(FEW_STEPS)
    if not args.init:
        settings = {} if pretrained else FOUR_STAGES  # {}: those of the weights
        changes |= {**A_SMALL_DETECTOR, "detector.backbone.settings": settings}
    said = {word.partition("=")[0] for word in words}
    return [*words, *(f"{key}={value}" for key, value in changes.items() if key not in said)]


def write_data_with_masks(root):
    write_data(root)
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        for each in content["annotations"]:
            x, y, w, h = each["bbox"]
            each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        file.write_text(json.dumps(content))


@pytest.fixture
def surroundings(downloads, tmp_path, monkeypatch):
    """Where the commands of a page run: small data and images under the names that pages give them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
    ResNetModel(ResNetConfig(**FOUR_STAGES)).save_pretrained("microsoft/resnet-50")
    SwinModel(SwinConfig(**sizes)).save_pretrained("microsoft/swin-large-patch4-window12-384-in22k")
    (tmp_path / "mine.yaml").write_text((downloads / "mine.yaml").read_text())
    write_data_with_masks(tmp_path / "ROOT")
    for split, name in (("train", "aachen_000000_000019"), ("val", "bonn_000000_000019")):
        picture(tmp_path / "ROOT", split, name, (26000, 4, 6, 10, 8), (24001, 30, 6, 5, 5))
    for name in ("COCO", "CITYSCAPES"):
        (tmp_path / name).symlink_to("ROOT")
    (tmp_path / "annotations").symlink_to("ROOT/annotations")
    for split, letter in (("train", "a"), ("val", "b")):
        (tmp_path / f"{letter}.json").symlink_to(f"ROOT/annotations/instances_{split}2017.json")
        (tmp_path / letter).symlink_to(f"ROOT/{split}2017")
    (tmp_path / "folder").mkdir()
    for image in ("photo.jpg", "street.jpg", "folder/one.png"):
        Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / image)
    write_digits("data/digits", train_images=4, val_images=2, progress=False)
    return tmp_path


def runs_of(page):
    """Commands of a page that are ours, without those that start a run which a command before has started."""
    seen = set()
    for words in lines(page):
        ours, _ = started(words)
        if ours is None:
            continue
        args = parsed(ours)
        if args.action is cli.train and not args.resume:
            if run_folder(args) in seen:
                ours = [*ours, "--name", f"run-{len(seen)}"]
            seen.add(run_folder(parsed(ours)))
        yield words, ours


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if list(runs_of(page))], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_their_order(page, surroundings):
    if "checkpoint0011_4scale.pth" in page.read_text():
        random = random_state(dino(swin=False)).items()
        finite = {name: each.abs() + 0.5 if "running_var" in name else 0.02 * each for name, each in random}
        torch.save({"model": finite}, "checkpoint0011_4scale.pth")
        small_transformers_model().save_pretrained("SenseTime/deformable-detr-with-box-refine-two-stage")
    for words, ours in runs_of(page):
        if words[0] in ("accelerate", "torchrun") and reason(words) is None:
            module = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}[words[0]]
            before = words[1 : words.index("route_detr") + 1]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", module, *before, *small(ours)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-2000:]}"
        else:
            assert main(small(ours)) == 0, shlex.join(words)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, words in COMMANDS.items() if words[0] == "route-kernels"])
def test_commands_of_the_kernels_run(name, surroundings):
    if why := reason(COMMANDS[name]):
        pytest.skip(why)
    assert route_kernels.cli.main(COMMANDS[name][1:]) == 0
