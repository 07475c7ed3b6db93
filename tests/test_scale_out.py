"""Two processes (gloo, CPU) compute what one does, in DDP and in FSDP, and a lost one is told and survived."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.utils import DistributedType
from small_training import SMALL, options, write_data
from torch import nn
from two_processes import seen_while_training

from route_detr.config import preset
from route_detr.data.coco import coco_layout
from route_detr.errors import UsageError
from route_detr.run import Run, load_checkpoint
from route_detr.scale_out import ACCUMULATION, GlobalBatchNorm2d, accumulation, prepared, share_norms, start_processes
from route_detr.train import Training

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "tests" / "two_processes.py")
ONE_SIZE = {"transforms.scales": [64], "transforms.max_size": 64, "transforms.crop": 0.0}  # the same padding: none
CHANGES = {**ONE_SIZE, "train.batch_size": 4, "train.epochs": 5, "train.drop_at": 1.0, "schedule.warmup": 1.0}
MODES = ("ddp", "fsdp")


def launch(*arguments, module="torch.distributed.run", **environment):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)


def torchrun(*arguments, **environment):
    return launch("--standalone", "--nproc-per-node", 2, *arguments, **environment)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("coco"), train_images=16, val_images=5)


@pytest.fixture(scope="module")
def paths(data):
    layout = coco_layout(data)
    return {
        f"{split}_{kind}": str(getattr(getattr(layout, split), part))
        for split in ("train", "val")
        for kind, part in (("json", "annotations"), ("images", "images"))
    }


@pytest.fixture(scope="module")
def config():
    return preset("tiny").updated({**SMALL, **CHANGES})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, paths, config):
    """The run of one process and what it saw."""
    torch.set_num_threads(1)
    training = Training(Run(tmp_path_factory.mktemp("alone") / "run"), config, paths, start_processes("cpu"))
    return training, seen_while_training(training)


@pytest.fixture(scope="module")
def together(tmp_path_factory, paths, config):
    """The folder with the runs of two processes."""
    out = tmp_path_factory.mktemp("together")
    done = torchrun(SCRIPT, "train", json.dumps(config.to_dict()), json.dumps(paths), out)
    assert done.returncode == 0, done.stderr
    return out


def steps(run):
    return [record for record in run.records() if record["kind"] == "step"]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_losses_of_one(mode, alone, together):
    expected, found = steps(alone[0].run), steps(Run(together / mode))
    assert len(found) == 20 and max(record["routing_strength"] for record in found) == pytest.approx(0.3)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert [other[name] for name in one if "/" in name or name in ("loss", "grad_norm")] == pytest.approx(
            [one[name] for name in one if "/" in name or name in ("loss", "grad_norm")], rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_end_with_the_weights_of_one(mode, alone, together):
    expected, found = (load_checkpoint(run.last) for run in (alone[0].run, Run(together / mode)))
    assert expected["model"].keys() == found["model"].keys()
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=1e-3, atol=1e-4)
    moments, others = expected["optimizer"]["state"], found["optimizer"]["state"]
    assert moments.keys() == others.keys()
    assert all(moments[index]["exp_avg"].shape == others[index]["exp_avg"].shape for index in moments)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_comes_back_on_every_rank(mode, together):
    assert all(json.loads((together / f"{mode}-{rank}.json").read_text())["comes back"] for rank in (0, 1))


@pytest.mark.parametrize("mode", MODES)
def test_every_rank_routes_as_the_schedule_says(mode, alone, together):
    expected = alone[1]
    ranks = [json.loads((together / f"{mode}-{rank}.json").read_text()) for rank in (0, 1)]
    assert expected["steps"][0][0] == 1 and expected["steps"][-1][0] == 2  # branches, before and after the fork
    for seen in ranks:
        assert [step[:3] for step in seen["steps"]] == [step[:3] for step in expected["steps"]]
        assert {step[3] for step in seen["steps"]} == {2}  # half of the global batch
    assert ranks[0]["router"] == ranks[1]["router"] != []
    assert ranks[0]["kind"] == {"ddp": "DistributedDataParallel", "fsdp": "FSDPDetector"}[mode]


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_shared_and_counts_every_image_once(mode, alone, together):
    """Five images in batches of four: the second rank has one image, and no rank counts another's."""
    for rank in (0, 1):
        evaluations = json.loads((together / f"{mode}-{rank}.json").read_text())["evaluations"]
        assert len(evaluations) == 5
        for (results, ids), (expected, all_ids) in zip(evaluations, alone[1]["evaluations"], strict=True):
            assert sorted(ids) == sorted(all_ids) == [1, 2, 3, 4, 5]
            scores, known = (
                sorted((each["image_id"], each["score"]) for each in entries) for entries in (results, expected)
            )
            assert [image for image, _ in scores] == [image for image, _ in known]
            assert [score for _, score in scores] == pytest.approx([score for _, score in known], abs=1e-4)


def test_only_the_first_rank_writes(alone, together):
    for mode in MODES:
        names = {file.name for file in (together / mode).iterdir() if not file.name.startswith("events")}
        assert names == {"config.json", "metrics.jsonl", "last.pt", "best.pt", "curves.png"}
        events = [file.name.split(".") for file in (together / mode).iterdir() if file.name.startswith("events")]
        assert len({process for *_, process, _ in events}) == 1
        assert json.loads((together / mode / "config.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_killed_process_ends_the_run_clearly_and_one_process_can_go_on(tmp_path, alone, data, paths, config):
    folder = tmp_path / "run"
    command = ["train", "--data", data, "--out", folder, "--device", "cpu", "--threads", "1", *options(CHANGES)]
    done = torchrun(SCRIPT, "lose_a_process", *command, ACCELERATE_USE_FSDP="true")
    assert done.returncode != 0
    message = f"route-detr: error: rank 0 lost the connection to another process, which has ended, at step 7; {folder}"
    assert message in done.stderr
    assert load_checkpoint(folder / "last.pt")["progress"]["step"] == 6

    training = Training(Run(folder), config, paths, start_processes("cpu"))
    training.resume()
    following = training.steps()
    step = next(following).read(training.accelerator)
    assert step["loss"] == pytest.approx(steps(alone[0].run)[6]["loss"], rel=1e-5)


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path, paths, config, monkeypatch):
    """With norms that do not learn from the batch; losses are divided by the boxes of all micro-batches."""
    found = []
    for pieces in (1, 2):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(pieces))
        training = Training(Run(tmp_path / str(pieces)), config, paths, start_processes("cpu"))
        for module in training.detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda norm, inputs: norm.eval() and None)
        stepping = training.steps()
        values = []
        for step in stepping:
            training.progress.count_step(0.0)
            values.append(step.read(training.accelerator))
        found.append([value[name] for value in values for name in ("loss", "grad_norm")])
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    start_processes("cpu")
    assert found[1] == pytest.approx(found[0], rel=1e-5)


WAYS = {
    "field": ({"train.accumulate": 2}, {}, []),
    "environment": ({}, {ACCUMULATION: "2"}, []),
    "launcher": ({}, {ACCUMULATION: "1"}, ["--gradient_accumulation_steps=2"]),  # 1: what it writes for DeepSpeed
    "all alike": ({"train.accumulate": 2}, {ACCUMULATION: "2"}, ["--gradient_accumulation_steps", "2"]),
    "none": ({}, {}, []),
}


@pytest.fixture
def launched(monkeypatch):
    """Makes the parent of this process look like `accelerate launch` with these options and environment."""

    def look(options, environment=()):
        command = ["python", "/somewhere/bin/accelerate", "launch", *options, "-m", "route_detr", "train"]
        parent = SimpleNamespace(cmdline=lambda: command, environ=lambda: dict(environment))
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    yield look
    monkeypatch.undo()
    start_processes("cpu")


@pytest.mark.parametrize("way", WAYS)
def test_batches_are_computed_in_as_many_pieces_as_asked_for(way, tmp_path, paths, config, monkeypatch, launched):
    """Sixteen images in batches of four: four steps of the optimizer an epoch, of one or two forward passes each."""
    changes, environment, options = WAYS[way]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if options:
        launched(options)
    training = Training(Run(tmp_path), config.updated(changes), paths, start_processes("cpu"))
    images, updates = [], []
    training.model.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))
    training.optimizer.optimizer.register_step_post_hook(lambda *_: updates.append(1))
    stepping = training.steps()
    assert len(list(stepping)) == len(updates) == 4
    assert images == ([4] * 4 if way == "none" else [2] * 8)


@pytest.mark.parametrize(
    ("field", "environment", "options", "message"),
    [
        (1, "2", [], f"expected one number, got train.accumulate = 1, {ACCUMULATION} = 2"),
        (4, None, ["--gradient_accumulation_steps", "2"], "train.accumulate = 4, --gradient_accumulation_steps = 2"),
        (None, "many", [], f"{ACCUMULATION}: expected a whole number of at least 1, got many"),
        (None, None, ["--gradient_accumulation_steps=-3"], "--gradient_accumulation_steps: expected a whole number"),
    ],
)
def test_accumulation_is_one_number(field, environment, options, message, monkeypatch, launched):
    launched(options)
    if environment is not None:
        monkeypatch.setenv(ACCUMULATION, environment)
    with pytest.raises(UsageError, match=message):
        accumulation(field)


def test_batches_that_cannot_be_shared_are_told_before_data_are_read(tmp_path, config):
    message = r"train\.batch_size: expected a multiple of 3 \(processes x accumulation\), got 4"
    with pytest.raises(ValueError, match=message):
        Training(Run(tmp_path), config.updated({"train.accumulate": 3}), {}, start_processes("cpu"))
    start_processes("cpu")


def test_a_launcher_that_starts_one_process_of_several_is_told(monkeypatch, launched):
    launched(["--cpu", "--num_processes", "2"])
    monkeypatch.setattr(sys, "argv", ["route-detr", "train", "--data", "my data"])
    start_processes("cpu")  # its address is not there: one process is what was asked for
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    command = "torchrun --nproc-per-node 2 -m route_detr train --data 'my data' --device cpu"
    with pytest.raises(UsageError, match=f"one process of 2, since it does not find so many GPUs; .*: {command}$"):
        start_processes("cpu")
    launched([], {"MASTER_ADDR": "127.0.0.1"})  # the user's own
    start_processes("cpu")


@pytest.mark.slow
def test_accumulation_that_accelerate_launch_is_told_reaches_the_run(tmp_path, data):
    words = ["-m", "route_detr", "train", "--data", data, "--out", tmp_path / "run", "--device", "cpu"]
    changes = options({**CHANGES, "train.epochs": 1})
    done = launch("--gradient_accumulation_steps", 4, *words, *changes, module="accelerate.commands.launch")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["accumulation"] == 4


def test_one_device_of_several_is_not_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--device cpu:0: expected cpu, cuda or auto"):
        start_processes("cpu:0")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "accelerate with FSDP", "torchrun"])
def test_the_commands_of_the_docs_train(launcher, tmp_path, data):
    words = options({**CHANGES, "train.epochs": 1})
    command = ["-m", "route_detr", "train", "--data", data, "--out", tmp_path / "run", "--device", "cpu", *words]
    if launcher == "torchrun":
        done = torchrun(*command)
    else:
        kind = ["--use_fsdp", "--fsdp_version", 2] if "FSDP" in launcher else ["--multi_gpu"]
        several = ["--num_processes", 2, "--num_machines", 1, "--mixed_precision", "bf16", "--dynamo_backend", "no"]
        done = launch(*kind, *several, *command, module="accelerate.commands.launch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("main branch (plain self-attention)") == 1
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["processes"] == 2
    assert written["precision"] == ("no" if launcher == "torchrun" else "bf16")
    assert written["distributed"] == ("FSDP" if "FSDP" in launcher else "MULTI_CPU")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_deepspeed_gives_the_losses_of_one(precision, tmp_path, alone, paths, config):
    """Later losses drift apart: DeepSpeed's optimizer counts steps in which a router has no gradient yet."""
    pytest.importorskip("deepspeed")
    words = [json.dumps(config.to_dict()), json.dumps(paths), tmp_path / "run"]
    done = torchrun(SCRIPT, "deepspeed", *words, ACCELERATE_MIXED_PRECISION=precision)
    assert done.returncode == 0, done.stderr
    expected, found = steps(alone[0].run), steps(Run(tmp_path / "run"))
    assert len(found) == 20
    tolerances = [1e-4 if index < 5 else 5e-2 for index in range(20)] if precision == "no" else [5e-2] * 20
    for one, other, tolerance in zip(expected, found, tolerances, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance)
        assert other["routing_strength"] == one["routing_strength"]
    own, others = (load_checkpoint(run.last)["model"] for run in (alone[0].run, Run(tmp_path / "run")))
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in others.items()}


@pytest.mark.parametrize(
    "stage, precision, message", [(3, "no", "stage 0, 1 or 2, got 3"), (2, "fp16", "no or bf16, got fp16")]
)
def test_what_deepspeed_is_not_made_to_do_here_is_refused(stage, precision, message, config):
    accelerator = SimpleNamespace(
        num_processes=2, distributed_type=DistributedType.DEEPSPEED, mixed_precision=precision,
        device=torch.device("cpu"), state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )  # fmt: skip
    with pytest.raises(UsageError, match=message):
        prepared(accelerator, nn.Linear(1, 1), None, config.train)


@pytest.mark.parametrize(("device", "kind"), [("cuda", nn.SyncBatchNorm), ("cpu", GlobalBatchNorm2d)])
def test_norms_of_all_ranks_keep_their_parameters(device, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    before = dict(model.named_parameters())
    share_norms(model, torch.device(device))
    assert type(model[1][0]) is kind
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
