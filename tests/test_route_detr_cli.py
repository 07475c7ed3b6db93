import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_training import options, write_data

from route_detr.cli import main, parsed, run_folder
from route_detr.data.report import DatasetError
from route_detr.predict import Trained, image_files, pictures_of
from route_detr.run import Run, save_checkpoint

ROOT = Path(__file__).parents[1]
RUN_FILES = {"metrics.jsonl", "config.json", "last.pt", "best.pt", "curves.png", "detections.png"}


@pytest.fixture(scope="module", autouse=True)
def threads_stay_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("coco"))


def train_arguments(data, out, *more, changes=None):
    words = f"train --data {data} --out {out} --threads 1 --device cpu"
    return [*words.split(), *options(changes), *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(train_arguments(data, folder)) == 0
    return folder


def fails(capsys, *arguments, code=2):
    """The one-line message of a command that must fail."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("route-detr: error: ")
    return lines[0]


def is_picture(path, at_least=300):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) >= at_least


def timeless(folder):
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in Run(folder).records()]


def start(*arguments):
    command = [sys.executable, "-m", "route_detr", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_lines(process, folder, lines):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(Run(folder).records()) < lines:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_train_writes_the_whole_run_folder(run, data):
    files = {file.name for file in run.iterdir()}
    assert RUN_FILES | {"routing.png"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".tmp") for name in files)
    for picture in ("curves.png", "detections.png", "routing.png"):
        assert is_picture(run / picture)
    for checkpoint in ("last.pt", "best.pt"):
        state = torch.load(run / checkpoint, weights_only=True)
        assert [category["name"] for category in state["categories"]] == ["square", "bar"]
    assert json.loads((run / "config.json").read_text())["data"]["train_images"] == str(data / "train2017")


def test_a_run_killed_by_sigkill_resumes_bit_for_bit(run, data, tmp_path):
    folder = tmp_path / "killed"
    process = start(*train_arguments(data, folder))
    wait_for_lines(process, folder, random.randint(2, 12))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert main(["train", "--out", str(folder), "--resume", "--device", "cpu"]) == 0
    states = [torch.load(each / "last.pt", weights_only=True) for each in (run, folder)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert timeless(run) == timeless(folder)


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(data, tmp_path):
    folder = tmp_path / "stopped"
    process = start(*train_arguments(data, folder, changes={"train.epochs": 500, "train.eval_every": 500}))
    wait_for_lines(process, folder, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"continue with: route-detr train --resume --out {folder}" in errors
    assert "Traceback" not in errors
    saved = torch.load(folder / "last.pt", weights_only=True)["progress"]["step"]
    assert saved == Run(folder).records()[-1]["step"] >= 3


def test_the_plain_baseline_has_no_routing(data, tmp_path, capsys):
    folder = tmp_path / "plain"
    assert main(train_arguments(data, folder, "--no-route", changes={"train.epochs": 1})) == 0
    assert {record.get("routing_strength", 0) for record in Run(folder).records()} == {0}
    assert {file.name for file in folder.iterdir()} >= RUN_FILES and not (folder / "routing.png").exists()
    assert "trained with --no-route" in fails(capsys, "inspect", "routing", folder)
    assert "detector.route=True: the run to resume has another value" in fails(
        capsys, "train", "--out", folder, "--resume", "--route"
    )


def test_eval_prints_the_table_and_writes_json(run, data, tmp_path, capsys):
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.split()[:6] == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    written = json.loads((run / "eval-best.json").read_text())
    best = torch.load(run / "best.pt", weights_only=True)["progress"]["best"]
    assert written["AP"] == best["AP"] and written["AP50"] == best["AP50"] and written["images"] == 3
    out = tmp_path / "last.json"
    assert main(["eval", str(run), "--data", str(data), "--checkpoint", "last", "--out", str(out)]) == 0
    last = [record for record in Run(run).records() if record["kind"] == "epoch"][-1]
    assert json.loads(out.read_text())["AP"] == last["AP"]


def test_eval_rejects_other_categories_and_data_without_boxes(run, data, tmp_path, capsys):
    annotations = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    renamed = {**annotations, "categories": [{"id": 7, "name": "circle"}, {"id": 90, "name": "bar"}]}
    paths = ["--val-json", tmp_path / "val.json", "--val-images", data / "val2017"]
    (tmp_path / "val.json").write_text(json.dumps(renamed))
    assert "category 7 is 'circle', for the detector 'square'" in fails(capsys, "eval", run, *paths)
    (tmp_path / "val.json").write_text(json.dumps({**annotations, "annotations": []}))
    assert main(["eval", str(run), *map(str, paths)]) == 2
    assert "none of the 3 evaluated images has an annotated box" in capsys.readouterr().err


@pytest.fixture
def odd_images(tmp_path):
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    colours = Image.effect_noise((50, 40), 60)
    colours.save(folder / "grey.png")
    colours.convert("P").save(folder / "palette.png")
    colours.convert("RGBA").save(folder / "alpha.png")
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.convert("RGB").save(folder / "turned.jpg", exif=exif)
    colours.save(folder / "more" / "grey.png")
    (folder / "notes.txt").write_text("not an image, and no one asked for it")
    return folder


def test_predict_takes_images_of_any_mode_and_folders(run, odd_images, tmp_path):
    out = tmp_path / "found"
    arguments = [str(odd_images), str(odd_images / "more" / "grey.png"), "--out", str(out), "--score-threshold", "0"]
    assert main(["predict", str(run), *arguments]) == 0
    names = {"alpha.png", "cmyk.png", "grey.png", "palette.png", "turned.png", "grey-2.png"}
    assert {file.name for file in out.iterdir()} == names | {"predictions.json"}
    assert all(is_picture(out / name) for name in names)
    with Image.open(out / "turned.png") as upright, Image.open(out / "grey.png") as wide:
        assert upright.height > upright.width and wide.width > wide.height
    results = json.loads((out / "predictions.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3, 4, 5, 6}
    for result in results:
        assert (result["category_id"], result["category_name"]) in {(7, "square"), (90, "bar")}
        x, y, w, h = result["bbox"]
        width, height = (40, 50) if result["file_name"].endswith("turned.jpg") else (50, 40)
        assert 0 <= x <= x + w <= width + 0.01 and 0 <= y <= y + h <= height + 0.01
        assert 0 <= result["score"] <= 1


def test_predict_leaves_out_what_is_not_certain_enough(run, odd_images, tmp_path):
    assert (
        main(["predict", str(run), str(odd_images / "grey.png"), "--out", str(tmp_path), "--score-threshold", "1"]) == 0
    )
    assert json.loads((tmp_path / "predictions.json").read_text()) == []


def test_predict_does_what_it_can_and_names_what_it_cannot_read(run, odd_images, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    noise = Image.effect_noise((300, 200), 60)
    noise.save(tmp_path / "whole.jpg")
    (odd_images / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    (odd_images / "._grey.png").write_bytes(b"\0\5\26\7" * 32)
    (odd_images / "paper.pdf").write_bytes(b"%PDF-1.7 ...")
    (odd_images / "gone.png").symlink_to("nowhere.png")
    (odd_images / "round.png").symlink_to("round.png")
    (odd_images / "folder.png").mkdir()
    line = fails(capsys, "predict", run, odd_images, *out, "--score-threshold", "0", code=1)
    assert "5 of 10 images: " in line
    unread = ("half.jpg", "._grey.png", "paper.pdf", "gone.png", "round.png")
    assert all(f"{name}: cannot be used as an image" in line for name in unread)
    found = json.loads((tmp_path / "x" / "predictions.json").read_text())
    assert {Path(result["file_name"]).name for result in found} == {
        "alpha.png", "cmyk.jpg", "grey.png", "palette.png", "turned.jpg"
    }  # fmt: skip
    assert "notes.txt: cannot be" in fails(capsys, "predict", run, odd_images / "notes.txt", *out, code=1)
    assert json.loads((tmp_path / "x" / "predictions.json").read_text()) == []
    assert "absent.png: no such image or folder" in fails(capsys, "predict", run, odd_images / "absent.png", *out)
    (tmp_path / "empty").mkdir()
    assert "a folder without images" in fails(capsys, "predict", run, tmp_path / "empty", *out)
    assert "--score-threshold" in fails(capsys, "predict", run, odd_images, *out, "--score-threshold", "2")


def everything_in(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_predict_never_overwrites_what_it_did_not_write(run, odd_images, tmp_path, capsys):
    before = everything_in(odd_images)
    assert "another folder than that of the images" in fails(capsys, "predict", run, odd_images, "--out", odd_images)
    (tmp_path / "link").symlink_to(odd_images)
    assert "another folder than" in fails(capsys, "predict", run, odd_images, "--out", tmp_path / "link")
    grey = odd_images / "grey.png"
    assert "grey.png: is a file that route-detr did not write" in fails(
        capsys, "predict", run, grey, "--out", odd_images
    )
    assert everything_in(odd_images) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "predictions.json").write_text('[\n {\n  "image_id": 3,\n  "category_id": 1}]')
    assert "predictions.json: is a file that" in fails(capsys, "predict", run, grey, "--out", mine)
    (mine / "predictions.json").unlink()
    (mine / "grey.png").symlink_to(grey)
    assert "mine/grey.png: is a file that" in fails(capsys, "predict", run, grey, "--out", mine)
    assert [file.name for file in mine.iterdir()] == ["grey.png"] and everything_in(odd_images) == before
    assert "is a file" in fails(capsys, "predict", run, grey, "--out", grey)


def test_predict_replaces_its_own_pictures(run, odd_images, tmp_path):
    arguments = ["predict", str(run), str(odd_images), "--out", str(tmp_path / "found"), "--score-threshold", "0"]
    assert main(arguments) == 0
    first = everything_in(tmp_path / "found")
    assert main(arguments) == 0
    assert everything_in(tmp_path / "found") == first
    assert main([*arguments[:-1], "1"]) == main(arguments) == 0  # over an empty list, too
    assert everything_in(tmp_path / "found") == first


def test_names_that_a_file_system_may_take_for_one_get_a_number(tmp_path):
    names = ["a.png", "A.jpg", "a.tif", "\u00e9.png", "e\u0301.jpg"]
    found = [path.name for path in pictures_of([tmp_path / name for name in names], tmp_path)]
    assert found == ["a.png", "A-2.png", "a-3.png", "\u00e9.png", "e\u0301-2.png"]


def test_what_was_found_before_a_stop_is_written(run, odd_images, tmp_path, monkeypatch):
    found = Trained.detect

    def stopped(self, image, threshold):
        if image.size == (40, 50):
            raise KeyboardInterrupt
        return found(self, image, threshold)

    monkeypatch.setattr(Trained, "detect", stopped)
    assert main(["predict", str(run), str(odd_images), "--out", str(tmp_path), "--score-threshold", "0"]) == 130
    assert {result["image_id"] for result in json.loads((tmp_path / "predictions.json").read_text())} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("eval RUN --out FILE", "result.json"),
        ("export RUN --out FILE", "model.onnx"),
        ("export RUN --out FILE", "model.pt2"),
        ("import RUN/last.pt --out FILE", "weights.pt"),
        ("inspect routing RUN --out FILE", "routing.png"),
        ("inspect schedule --out FILE", "schedule.png"),
        ("train --out FOLDER", "config.json"),
        ("train --out FOLDER", "detections.png"),
    ],
)
def test_no_command_replaces_what_it_did_not_write(run, tmp_path, capsys, command, name):
    file = tmp_path / name
    words = command.replace("RUN", str(run)).replace("FILE", str(file)).replace("FOLDER", str(tmp_path)).split()
    if name.endswith("png"):
        Image.new("RGB", (9, 9)).save(file)
    elif name.endswith("pt"):
        torch.save({"format": "another"}, file)
    else:
        file.write_text('{"precious": true}')
    before = file.read_bytes()
    assert f"{file}: is a file that route-detr did not write" in fails(capsys, *words)
    assert file.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [name]
    file.unlink()
    file.mkdir()
    assert f"{file}: is no regular file" in fails(capsys, *words)


REFUSED = {  # RUN is a finished run; NEW and AGAIN begin another and go on with it
    "eval RUN --out RUN/best.pt": "best.pt: is route-detr's checkpoint and no JSON",
    "inspect routing RUN --out RUN/config.json": "config.json: is route-detr's configuration and no picture",
    "eval RUN --out RUN/config.json": "config.json: is route-detr's configuration and no JSON",
    "inspect routing RUN --out RUN/metrics.jsonl": "metrics.jsonl: is route-detr's metrics and no picture",
    "import RUN/last.pt --out RUN/best.pt": "best.pt is of a run and is not replaced",
    "import RUN/last.pt --out RUN/curves.png": "curves.png: is route-detr's picture and no checkpoint",
    "NEW --out RUN": "already holds a run",
    "NEW --out x train.speed=9": "unknown key 'train.speed'; did you mean",
    "NEW --out x train.epochs=2 train.epochs=3": "train.epochs: given twice",
    "NEW --out x --no-route detector.route=true": "detector.route: given twice",
    "NEW --out x train.epochs": "train.epochs: expected KEY=VALUE",
    "NEW --out x train.epochs=many": "train.epochs: .*integer.*, got 'many'",
    "NEW --out x train.epochs=0": "train.epochs: Input should be greater than 0, got 0",
    "NEW --out x --routed-layers last:9": "routed_layers: expected 'all', 'last:1' to 'last:3'",
    "NEW --out x --preset tiny --config my.yaml": "--preset and --config: expected one of them",
    "NEW --out x --config no_such.yaml": "no_such.yaml",
    "NEW --out x --preset huge": "preset: expected one of .*tiny",
    "NEW --out x --threads 0": "--threads: expected at least 1, got 0",
    "NEW --out x --device quantum": "--device quantum: ",
    "NEW --out x --name x": "--name and --out: expected one of them",
    "NEW --out x detector.num_classes=5": "detector.num_classes: the data set has 2 categories",
    "NEW --out x --data no/such/folder": "no COCO data set found from no/such/folder",
    "NEW --out x --resume": "nothing to resume",
    "AGAIN train.epochs=2": "train.epochs=2: the run to resume has done 3 epochs; expected more than that",
    "AGAIN train.time_budget=1e-3": "train.time_budget=0.001: the run to resume has taken",
    "AGAIN train.epochs=9 train.seed=9": "train.seed=9: the run to resume has another value, 0; leave it out",
    "AGAIN detector.embed_dim=32": "detector.embed_dim=32: the run to resume has another value",
    "AGAIN train.speed=1": "unknown key 'train.speed'",
    "AGAIN --preset deformable-detr-pp-r50": "--preset, --config: the run to resume began with tiny",
    "export RUN --out x.pt2 --size 0 0": "--size: expected a height and a width of at least 1, got 0 0",
    "export RUN --out x.onnx --size 64 -64": "--size: expected a height and a width of at least 1",
    "eval RUN --threads -2": "--threads: expected at least 1, got -2",
    "eval RUN --device gpu": "--device gpu: expected auto, cpu, cuda or one of its devices as cuda:1",
    "eval RUN --device meta": "--device meta: expected auto, cpu, cuda",
    "predict RUN x.png --out y --score-threshold nan": "--score-threshold: expected a number in 0..1",
    "inspect schedule --images 0": "--images: expected at least 1, got 0",
    "data digits digits --image-size 0": "image_size: Input should be greater than 0, got 0",
    "data cityscapes from to --workers -1": "--workers: expected at least 1, got -1",
}


@pytest.mark.parametrize("command", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(command, run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, short = everything_in(run), {"AGAIN": "train --out RUN --resume", "NEW": f"train --data {data}", "RUN": run}
    words = command
    for name, meaning in short.items():
        words = words.replace(name, str(meaning))
    line = fails(capsys, *words.split())
    assert re.search(REFUSED[command], line), line
    assert everything_in(run) == before and not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_output_that_nobody_takes_is_one_sentence(tmp_path, capsys, monkeypatch, number):
    def refuse(text):
        raise OSError(number, os.strerror(number))

    sizes = ["--train-images", "1", "--val-images", "1", "--image-size", "64"]
    monkeypatch.setattr(sys.stdout, "write", refuse)
    assert main(["data", "digits", str(tmp_path / "digits"), *sizes]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"route-detr: error: {os.strerror(number)}"


def test_folders_are_expanded_in_order(odd_images):
    names = ["alpha.png", "cmyk.jpg", "grey.png", "palette.png", "turned.jpg"]
    assert [file.name for file in image_files([odd_images])] == names


def test_inspect_draws_routing_and_schedule(run, data, tmp_path):
    image = str(data / "val2017" / "2.png")
    assert main(["inspect", "routing", str(run), "--image", image, "--out", str(tmp_path / "routing.png")]) == 0
    assert main(["inspect", "schedule", "train.epochs=6", "--out", str(tmp_path / "schedule.png")]) == 0
    assert is_picture(tmp_path / "routing.png") and is_picture(tmp_path / "schedule.png")


def test_data_digits_writes_a_coco_folder(tmp_path):
    out = tmp_path / "digits"
    sizes = ["--train-images", "2", "--val-images", "1", "--image-size", "96"]
    assert main(["data", "digits", str(out), *sizes]) == 0
    assert (out / "annotations" / "instances_train2017.json").is_file()
    assert len(list((out / "train2017").iterdir())) == 2


def test_without_data_the_bundled_digits_are_made_once(tmp_path, monkeypatch):
    from route_detr.tools import digits

    made = []

    def few_digits(out):
        made.append(out)
        return write_digits(out, train_images=2, val_images=1, progress=False)

    write_digits = digits.write_digits
    monkeypatch.setattr(digits, "write_digits", few_digits)
    monkeypatch.chdir(tmp_path)
    small = [*options({"train.epochs": 1}), "--device", "cpu"]
    assert main(["train", "--name", "a", *small]) == 0
    assert main(["train", "--name", "b", *small]) == 0
    assert made == ["data/digits"]
    assert json.loads(Path("runs/b/config.json").read_text())["detector"]["num_classes"] == 10
    assert main(["eval", "a", "--device", "cpu"]) == 0


def test_a_picture_that_fails_costs_a_warning_and_not_the_summary(data, tmp_path, capsys, monkeypatch):
    from route_detr.tools import plots

    curves = plots.plot_curves

    def fails_to_draw(*args):
        monkeypatch.setattr(plots, "plot_curves", curves)  # at the run's end it can be drawn
        raise ValueError("Ba$$in:\n  ^ ParseException")

    monkeypatch.setattr(plots, "plot_detections", fails_to_draw)
    monkeypatch.setattr(plots, "plot_curves", fails_to_draw)
    folder = tmp_path / "run"
    assert main(train_arguments(data, folder, changes={"train.epochs": 1})) == 0
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("route-detr: ")]
    assert told == [
        f"route-detr: warning: {folder / name}: not drawn: ValueError: Ba$$in: ^ ParseException"
        for name in ("curves.png", "detections.png")
    ]
    assert printed.out.startswith("main branch") and printed.out.endswith("last.pt, curves.png, routing.png\n")
    assert is_picture(folder / "curves.png") and not (folder / "detections.png").exists()


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ([], "runs/tiny"),
        (["--preset", "tiny-dab"], "runs/tiny-dab"),
        (["--config", "settings/mine.v2.yaml"], "runs/mine.v2"),
        (["--config", "mine.yaml", "--name", "a"], "runs/a"),
        (["--config", "mine.yaml", "--out", "b/c"], "b/c"),
    ],
)
def test_a_run_is_named_after_what_it_begins_with(words, folder):
    assert run_folder(parsed(["train", *words])) == Path(folder)


def test_a_yaml_file_and_overrides_anywhere_in_the_line(data, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny\ntrain: {epochs: 4, learning_rate: 1e-4}\n")
    out = str(tmp_path / "run")
    words = ["train", "train.learning_rate=2e-3", "--config", str(file), *options({"train.epochs": 1})[:-1]]
    words = [word for word in words if not word.startswith("train.learning_rate=0")]
    assert main([*words, "--data", str(data), "train.seed=3", "--out", out, "transforms.eval_scale=48"]) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["train"]["learning_rate"] == 2e-3 and written["train"]["epochs"] == 1
    assert (written["train"]["seed"], written["transforms"]["eval_scale"]) == (3, 48)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["preset"] == str(file)


@pytest.mark.parametrize("command", ["train", "eval", "predict", "export", "inspect schedule", "inspect routing"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([*command.split(), "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    if command == "train":
        assert "examples:" in shown and "accelerate launch" in shown and "KEY=VALUE" in shown


def test_a_misspelt_option_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--epoch", "3"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


def test_a_finished_run_goes_on_for_more_epochs(run, tmp_path, capsys):
    folder = tmp_path / "longer"
    shutil.copytree(run, folder)
    assert main(["train", "--out", str(folder), "--resume", "train.epochs=4", "--device", "cpu"]) == 0
    told = "train.epochs=4, not 3: the learning rate drops at 80% of the new length"
    assert capsys.readouterr().out.splitlines()[0] == told
    epochs = [record for record in Run(folder).records() if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [0, 1, 2, 3] and epochs[3]["step"] == 16
    assert json.loads((folder / "config.json").read_text())["train"]["epochs"] == 4
    assert timeless(folder)[: len(timeless(run))] == timeless(run)


def test_resume_notices_a_config_file_that_was_edited(data, tmp_path, capsys):
    file, folder = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text("base: tiny\ntrain: {epochs: 1, clip_norm: 0.2}\n")
    small = [word for word in options() if not word.startswith("train.epochs")]
    again = ["train", "--resume", "--out", str(folder), "--device", "cpu"]
    assert main(["train", "--config", str(file), "--data", str(data), *again[2:], *small]) == 0
    file.write_text("base: tiny\ntrain: {clip_norm: 0.2, epochs: 1}  # the same\n")
    capsys.readouterr()
    assert main([*again, "--config", str(file)]) == 0
    assert "warning" not in capsys.readouterr().err
    file.write_text("base: tiny\ntrain: {epochs: 2, clip_norm: 0.3}\n")
    assert f"{file}: train.clip_norm=0.3: the run to resume has another value, 0.2" in fails(
        capsys, *again, "--config", file
    )
    assert main(again) == 0
    edited = "edited since the run began (train.epochs from 1 to 2, train.clip_norm from 0.2 to 0.3)"
    assert f"route-detr: warning: {file}: {edited}, which keeps its values" in capsys.readouterr().err
    file.write_text("base: tiny\ntrain: {epochs: 2, clip_norm: 0.2}\n")
    assert main([*again, "--config", str(file)]) == 0
    assert Run(folder).records()[-1]["epoch"] == 1


def test_resume_finds_data_that_have_moved(run, data, tmp_path, capsys):
    folder, before, after = tmp_path / "run", tmp_path / "before", tmp_path / "after"
    shutil.copytree(data, before)
    assert main(train_arguments(before, folder, changes={"train.epochs": 1})) == 0
    before.rename(after)
    told = fails(capsys, "train", "--resume", "--out", folder)
    assert f"{folder}: {before}/annotations/instances_train2017.json is no longer there; say where" in told
    assert main(["train", "--resume", "--out", str(folder), "--data", str(after), "--device", "cpu"]) == 0
    assert main(["train", "--resume", "--out", str(folder), "--device", "cpu"]) == 0
    assert main(["eval", str(folder), "--device", "cpu"]) == 0


def test_resume_rejects_other_data_and_takes_what_agrees(run, data, tmp_path, capsys):
    other = write_data(tmp_path / "other", val_images=2)
    told = "the validation set's annotations have changed since the run began"
    assert told in fails(capsys, "train", "--out", run, "--resume", "--data", other)
    assert main(train_arguments(data, run, "--resume", "train.workers=1")) == 0


@pytest.mark.parametrize("command", ["eval", "predict", "export", "inspect routing", "inspect schedule", "import"])
def test_what_cannot_be_written_is_told_before_any_work(command, run, data, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("the user's")
    out = tmp_path / "notes.txt" / "found.pt2"
    more = {"predict": [data / "val2017"], "inspect schedule": [], "import": ["nobody/nothing"]}.get(command, [])
    trained = [] if command in ("inspect schedule", "import") else [run]
    message = fails(capsys, *command.split(), *trained, *more, "--out", out)
    assert f"{out}" in message and f"cannot be written, {tmp_path / 'notes.txt'} is no folder" in message


def test_folders_of_what_is_written_are_made(run, tmp_path):
    out = tmp_path / "new" / "folder"
    assert main(["eval", str(run), "--device", "cpu", "--out", str(out / "found.json")]) == 0
    assert main(["inspect", "schedule", "train.epochs=2", "--out", str(out / "deeper" / "schedule.png")]) == 0
    assert {file.name for file in out.iterdir()} == {"found.json", "deeper"}


def test_a_checkpoint_without_data_asks_for_them(run, data, tmp_path, capsys):
    state = torch.load(run / "best.pt", weights_only=True)
    save_checkpoint(tmp_path / "imported.pt", {**state, "data": {}})
    assert "error: --data ROOT, or --val-json and --val-images: expected" in fails(
        capsys, "eval", tmp_path / "imported.pt"
    )
    assert "error: --image: expected, since" in fails(capsys, "inspect", "routing", tmp_path / "imported.pt")
    image = ["--image", str(data / "val2017" / "1.png")]
    assert main(["inspect", "routing", str(tmp_path / "imported.pt"), *image]) == 0
    assert main(["eval", str(tmp_path / "imported.pt"), "--data", str(data)]) == 0


def test_bad_checkpoints_and_runs_are_named(tmp_path, capsys, run):
    assert "nowhere: no such run folder" in fails(capsys, "eval", tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    assert "best.pt: no such checkpoint" in fails(capsys, "eval", tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    assert "last.pt: cannot be read" in fails(capsys, "eval", tmp_path / "run", "--checkpoint", "last")
    assert "last.pt: cannot be read" in fails(capsys, "train", "--out", tmp_path / "run", "--resume")


def test_a_loss_that_is_not_finite_ends_with_exit_code_1(data, tmp_path, capsys):
    arguments = train_arguments(data, tmp_path / "run", changes={"train.l1_weight": 1e38, "train.checkpoint_every": 1})
    assert main(arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()[-1]
    assert errors.startswith("route-detr: error: ") and "at step 1" in errors and "/l1 = inf" in errors
    assert f"{tmp_path / 'run' / 'last.pt'} holds the run as it was before" in errors
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["step"] == 0


def use(run, data, out):
    """Every command that reads a checkpoint of ``run``, but `train`."""
    return [
        ["eval", run],
        ["predict", run, data / "val2017", "--out", out],
        ["export", run, "--out", f"{out}.onnx"],
        ["inspect", "routing", run, "--out", f"{out}.png"],
    ]


def test_a_model_that_is_not_finite_is_of_no_use(run, data, tmp_path, capsys):
    state = torch.load(run / "best.pt", weights_only=True)
    next(value for name, value in state["model"].items() if name.endswith("running_var"))[1] = float("nan")
    for name in ("best.pt", "last.pt"):
        torch.save(state, tmp_path / name)
    train = [["train", "--resume", "--out", tmp_path], train_arguments(data, tmp_path / "new", "--init", str(tmp_path))]
    for command in [*use(tmp_path, data, tmp_path / "x"), *train]:
        assert re.search(r"(best|last)\.pt: its model has diverged: 1 of \d+ tensors hold NaN", fails(capsys, *command))
    assert {file.name for file in tmp_path.iterdir()} == {"best.pt", "last.pt"}


def test_a_model_that_overflows_is_told(run, data, tmp_path, capsys):
    state = torch.load(run / "best.pt", weights_only=True)
    for name, value in state["model"].items():
        if "classify.weight" in name or "routers" in name:
            value.fill_(3e38)
    torch.save(state, tmp_path / "best.pt")
    told = [
        r"no average precision of the images with the ids \[1, 2\]: what the detector computes for image 1 of 2 is not",
        r"val2017/1\.png: what the detector computes for image 1 of 1 is not finite",
        r"x\.onnx: not written, what the trained detector computes is not finite",
        r"the routing bias of decoder layer 1 is not finite",
    ]
    for command, message in zip(use(tmp_path, data, tmp_path / "x"), told, strict=True):
        assert re.search(message, fails(capsys, *command, code=1))


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
ENDS = {
    "killed": (RuntimeError(KILLED), 1, "reads images (pid 7) was killed by"),
    "unreadable": (DatasetError("x/y.png: cannot be used as an image: cut"), 2, "error: x/y.png: cannot be used as"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_the_reading_of_images_says_that_the_checkpoint_stands(data, tmp_path, capsys, monkeypatch, end):
    error, code, told = ENDS[end]

    def ended(*arguments):
        raise error
        yield

    monkeypatch.setattr("route_detr.train.Training.steps", ended)
    assert main(train_arguments(data, tmp_path / "run")) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in line and line.endswith(f"{tmp_path / 'run' / 'last.pt'} holds the run as it was before")


def test_debug_shows_where_an_error_comes_from(tmp_path):
    from route_detr.errors import RunError

    with pytest.raises(RunError):
        main(["eval", str(tmp_path / "nowhere"), "--debug"])
