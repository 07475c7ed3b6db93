import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_training import SMALL, write_data

from route_detr import run as run_module
from route_detr import train as training_module
from route_detr.config import preset
from route_detr.data.batches import epoch_batches, micro_batches
from route_detr.data.coco import coco_layout
from route_detr.errors import CheckpointError, Interrupted, NonFiniteLoss, RunError, WriteError
from route_detr.run import Run, load_checkpoint, save_checkpoint
from route_detr.scale_out import start_processes
from route_detr.train import LossSums, Progress, Step, Training


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    layout = coco_layout(write_data(tmp_path_factory.mktemp("coco")))
    return {
        f"{split}_{kind}": str(getattr(getattr(layout, split), part))
        for split in ("train", "val")
        for kind, part in (("json", "annotations"), ("images", "images"))
    }


def small_config(changes=None):
    return preset("tiny").updated({**SMALL, **(changes or {})})


def new_training(folder, data, changes=None):
    training = Training(Run(folder), small_config(changes), data, start_processes("cpu"))
    training.start()
    return training


def resumed(folder, data, changes=None):
    training = Training(Run(folder), small_config(changes), data, start_processes("cpu"))
    training.resume()
    return training


def timeless(run):
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in run.records()]


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_same_run(one, other):
    assert_same_tensors(one.detector.state_dict(), other.detector.state_dict())
    a, b = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for number, moments in a["state"].items():
        assert_same_tensors(moments, b["state"][number])
    assert timeless(one.run) == timeless(other.run)
    best = [torch.load(each.run.best, weights_only=True) for each in (one, other)]
    assert_same_tensors(best[0]["model"], best[1]["model"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    training = new_training(tmp_path_factory.mktemp("runs") / "whole", data)
    training.fit()
    return training


def test_metrics_have_a_line_for_each_step_and_epoch(uninterrupted):
    records = uninterrupted.run.records()
    assert [(r["kind"], r["epoch"], r["step"]) for r in records] == [
        line
        for epoch in range(3)
        for line in [("step", epoch, 4 * epoch + i) for i in (1, 2, 3, 4)] + [("epoch", epoch, 4 * epoch + 4)]
    ]
    for record in records:
        parts = {name: value for name, value in record.items() if "/" in name}
        assert sum(parts.values()) == pytest.approx(record["loss"], rel=1e-5)
    assert all(0 <= r["AP"] <= r["AP50"] <= 1 for r in records if r["kind"] == "epoch")
    strengths = [r["routing_strength"] for r in records if r["kind"] == "step"]
    assert strengths[:3] == [0, 0, 0] and strengths[-1] == pytest.approx(0.3) and strengths == sorted(strengths)
    assert float(uninterrupted.detector.routing.strength[-1]) == pytest.approx(0.3)


class Killed(BaseException):
    """Stands for SIGKILL: nothing between the place where it strikes and the test may catch it."""


def strike_at(call, owner, function, work, monkeypatch):
    """Do `work`, which is killed when it calls `function` of `owner` for the `call`-th time."""
    original, calls = getattr(owner, function), []

    def strike(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, strike)
        with pytest.raises(Killed):
            work()


PLACES = {
    "after the very first step": ("record", 1),
    "before a checkpoint within an epoch": ("save", 1),
    "before the checkpoint that ends the steps of an epoch": ("save", 2),
    "between the evaluation and the epoch's line": ("record", 5),
    "between the epoch's line and its checkpoint": ("save", 3),
    "between best.pt and last.pt": ("save_checkpoint", 4),
    "within the second epoch": ("record", 8),
    "in the last evaluation": ("evaluate", 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_anywhere_continues_bit_for_bit(place, tmp_path, data, uninterrupted, monkeypatch):
    function, call = PLACES[place]
    training = new_training(tmp_path / "run", data)
    owner = {"record": Run, "save": Run, "save_checkpoint": run_module}.get(function, training_module)
    strike_at(call, owner, function, training.fit, monkeypatch)
    with open(training.run.metrics_file, "a") as stream:
        stream.write('{"kind": "step", "epo')  # a line torn by the kill
    torch.manual_seed(12345)
    continued = resumed(tmp_path / "run", data)
    assert continued.progress.step <= training.progress.step
    continued.fit()
    assert_same_run(continued, uninterrupted)


def test_workers_change_nothing(tmp_path, data, uninterrupted):
    training = new_training(tmp_path / "run", data, {"train.workers": 2})
    training.fit()
    assert_same_tensors(training.detector.state_dict(), uninterrupted.detector.state_dict())
    assert timeless(training.run) == timeless(uninterrupted.run)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_saves_the_step_and_the_run_continues(tmp_path, data, uninterrupted, monkeypatch, signum):
    training = new_training(tmp_path / "run", data, {"train.checkpoint_every": 100})
    record = Run.record

    def then_signal(run, line):
        record(run, line)
        if line["step"] == 5:  # noticed after the step that follows
            os.kill(os.getpid(), signum)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", then_signal)
        with pytest.raises(Interrupted, match="at step 6") as stop:
            training.fit()
    assert stop.value.exit_code == 128 + signum
    continued = resumed(tmp_path / "run", data, {"train.checkpoint_every": 100})
    assert continued.progress.step == 6
    continued.fit()
    assert_same_tensors(continued.detector.state_dict(), uninterrupted.detector.state_dict())
    assert timeless(continued.run) == timeless(uninterrupted.run)


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = training_module.StopSignal()
    with stop.watched():
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGTERM) == stop._remember
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN and not stop.received


HOLDS_THE_LOCK = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(lock, fcntl.LOCK_EX)
os.write(lock, b"process 12 on elsewhere\\n")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_belongs_to_one_process_until_it_is_killed(tmp_path, data):
    folder, new = tmp_path / "run", tmp_path / "new"
    new_training(folder, data).run.close()
    assert not (folder / ".route-detr.lock").exists()
    new.mkdir()
    before = (folder / "last.pt").read_bytes()
    (folder / f"last.pt.{2**22 + 1}-0123abcd.tmp").write_bytes(before[:1000])  # of a process that no longer lives
    for begin, held in ((resumed, folder), (new_training, new)):
        command = [sys.executable, "-c", HOLDS_THE_LOCK, str(held / ".route-detr.lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout.readline() == b"locked\n"
            with pytest.raises(RunError, match=f"^{held}: process 12 on elsewhere is training in it"):
                begin(held, data)
            holder.kill()
    assert [file.name for file in new.iterdir()] == [".route-detr.lock"] and (folder / "last.pt").read_bytes() == before
    resumed(folder, data).run.close()
    assert not list(folder.glob("*.tmp")) and not (folder / ".route-detr.lock").exists()


def test_a_system_without_locks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "fcntl", None)
    with pytest.warns(
        UserWarning, match=r"run: cannot be locked \(Function not implemented\), start no second process"
    ):
        Run(tmp_path / "run").lock()


def test_a_disk_that_is_full_ends_the_run_and_names_what_stands(tmp_path, data, monkeypatch):
    training = new_training(tmp_path / "run", data)
    write = training_module.Run.record

    def full(run, record):
        if record["step"] == 3:
            with run_module.writing(run.metrics_file):
                raise OSError(errno.ENOSPC, "No space left on device")
        write(run, record)

    monkeypatch.setattr(Run, "record", full)
    stands = r"No space left on device, [\d.]+ MiB are free .*; .*last.pt holds the run as it was before$"
    with pytest.raises(WriteError, match=f"metrics.jsonl: cannot be written: {stands}"):
        training.fit()
    assert torch.load(training.run.last, weights_only=True)["progress"]["step"] == 2


def test_a_finished_run_resumes_to_nothing(tmp_path, data):
    training = new_training(tmp_path / "run", data, {"train.epochs": 1})
    training.fit()
    lines = training.run.metrics_file.read_text()
    again = resumed(tmp_path / "run", data, {"train.epochs": 1})
    again.fit()
    assert again.run.metrics_file.read_text() == lines
    assert again.summary().startswith("main branch")


def _infinite_part(losses):
    return {**losses, "loss": losses["loss"] * math.inf, "layer1/giou": losses["layer1/giou"] * math.nan}


def _infinite_gradient(losses):
    losses["loss"].register_hook(lambda gradient: gradient * math.inf)
    return losses


def _matching_fails(losses):
    raise FloatingPointError("matching cost of layer0, image 0 is not finite")


@pytest.mark.parametrize("every", [1, 2, 100], ids=lambda every: f"read back every {every}")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_infinite_part, "the loss is not finite at step 3: loss = inf, layer1/giou = nan, grad_norm = "),
        (_infinite_gradient, "the loss is not finite at step 3: grad_norm = "),
        (_matching_fails, "no finite loss at step 3: matching cost of layer0"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path, data, spoil, message, every):
    """Whenever it is noticed: at the step itself where it is logged or saved, else in the matching of the next one."""
    training = new_training(tmp_path / "run", data, {"schedule.warmup": 5, "train.log_every": every})
    criterion = training.criterion

    def criterion_that_fails_in_step_3(output, targets, box_count):
        losses = criterion(output, targets, box_count)
        return spoil(losses) if training.progress.step == 2 else losses

    training.criterion = criterion_that_fails_in_step_3
    with pytest.raises(NonFiniteLoss, match=message) as caught:
        training.fit()
    assert f"{training.run.last} holds the run as it was before" in str(caught.value)
    good = torch.load(training.run.last, weights_only=True)
    assert good["progress"]["step"] == 2
    assert all(value.isfinite().all() for value in good["model"].values())


def test_weights_that_are_not_finite_are_a_loss_that_is_not_finite(tmp_path, data):
    training = new_training(tmp_path / "run", data)
    with torch.no_grad():
        next(training.detector.decoder.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match=r"at step 1: .*layer0"):
        training.fit()


def half_precision_training(folder, data, monkeypatch):
    """With the scaler of float16 gradients, which a CPU has too; gradients are float32 here, and spoilt by hand."""
    accelerator = start_processes("cpu")
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    training = Training(Run(folder), small_config({"schedule.warmup": 5}), data, accelerator)
    monkeypatch.setattr(accelerator, "native_amp", True)  # so that gradients are unscaled before they are clipped
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    return training


def overflow_in(training, steps):
    """Weights before each step; the gradients of the ``steps`` overflow."""
    criterion, weights = training.criterion, []

    def criterion_that_overflows(output, targets, box_count):
        losses = criterion(output, targets, box_count)
        weights.append(next(training.detector.decoder.parameters()).detach().clone())
        return _infinite_gradient(losses) if training.progress.step + 1 in steps else losses

    training.criterion = criterion_that_overflows
    return weights


def test_a_step_whose_gradients_overflow_is_skipped_and_counted(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        training = half_precision_training(tmp_path / "run", data, patch)
        training.start()
        weights = overflow_in(training, (3, 4))
        training.fit()
    steps = [record for record in training.run.records() if record["kind"] == "step"]
    assert [record["skipped_steps"] for record in steps] == [0, 0, 1, *[2] * 9]
    assert [record["step"] for record in steps if "grad_norm" not in record] == [3, 4]
    stayed = [torch.equal(*pair) for pair in pairwise(weights)]
    assert stayed == [False, False, True, True, *[False] * 7]
    assert (training.progress.skipped, training.progress.skipped_in_a_row) == (2, 0)
    with monkeypatch.context() as patch:  # the scale comes back too
        again = half_precision_training(tmp_path / "run", data, patch)
        again.resume()
        assert again.accelerator.scaler.get_scale() == 2**14 and again.progress == training.progress


def test_gradients_that_are_never_finite_end_the_run(tmp_path, data, monkeypatch):
    monkeypatch.setattr(training_module, "SKIPPED_AT_MOST", 5)
    training = half_precision_training(tmp_path / "run", data, monkeypatch)
    training.start()
    overflow_in(training, range(2, 100))
    with pytest.raises(NonFiniteLoss, match="gradients of 5 steps in a row, up to step 6, are not finite at any scale"):
        training.fit()
    assert load_checkpoint(training.run.last)["progress"]["skipped"] == 3  # of step 4


def _statistics(detector):
    detector.backbone.get_buffer(next(name for name, _ in detector.backbone.named_buffers() if "mean" in name))[0] = (
        math.nan
    )


def _weights(detector):
    next(detector.encoder.parameters()).view(-1)[-1] = -math.inf


def _large_weights(detector):
    detector.decoder.heads[-1].classify.weight.fill_(3e38)


@pytest.mark.parametrize(
    ("spoil", "message", "last"),
    [
        (_statistics, r"the model is not finite after step 4: 1 of \d+ tensors hold .*running_mean; .*as it was", 2),
        (_weights, r"the model is not finite after step 4: 1 of \d+ tensors hold .* the first is encoder\.", 2),
        (_large_weights, r"no average precision of the images with the ids \[1, 2\]: .* image 1 of 2 is not finite", 4),
    ],
)
def test_a_model_that_is_not_finite_is_neither_scored_nor_saved(tmp_path, data, monkeypatch, spoil, message, last):
    """Where the losses do not show it: in the last step before the evaluation."""
    training = new_training(tmp_path / "run", data)
    step, steps = training.optimizer.step, []

    def spoiling_step():
        step()
        steps.append(1)
        if len(steps) == 4:
            with torch.no_grad():
                spoil(training.detector)

    monkeypatch.setattr(training.optimizer, "step", spoiling_step)
    with pytest.raises(NonFiniteLoss, match=message):
        training.fit()
    assert torch.load(training.run.last, weights_only=True)["progress"]["step"] == last
    assert not training.run.best.exists() and not any("AP" in record for record in training.run.records())


def test_a_step_names_every_bad_part():
    step = Step(9, ("loss", "a", "b"), torch.tensor([math.inf, 1.0, math.nan]), torch.tensor(2.0), {})
    for look in (step.check, lambda: step.read(start_processes("cpu"))):
        with pytest.raises(NonFiniteLoss, match=r"step 9: loss = inf, b = nan$"):
            look()


def test_loss_sums_follow_names_that_change_and_survive_a_checkpoint():
    sums = LossSums(lambda tensor: tensor, {"loss": 1.0})
    sums.add(("loss", "layer0"), torch.tensor([2.0, 0.5]))
    sums.add(("loss", "layer0.main"), torch.tensor([3.0, 0.25]))
    sums.add(("loss", "layer0.main"), torch.tensor([1.0, 0.25]))
    assert sums.read() == {"loss": 7.0, "layer0": 0.5, "layer0.main": 0.5}


def test_the_order_of_an_epoch_is_a_permutation_that_seed_and_epoch_decide():
    batches = epoch_batches([True] * 11, 4, seed=5, epoch=2)
    order = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert sorted(order[:11]) == list(range(11)) and order[11] == order[0]
    assert [len(batch) for batch in epoch_batches([True] * 3, 8, seed=0, epoch=0)] == [8]
    torch.manual_seed(0)
    assert epoch_batches([True] * 11, 4, seed=5, epoch=2) == batches
    assert epoch_batches([True] * 11, 4, seed=5, epoch=3) != batches != epoch_batches([True] * 11, 4, seed=6, epoch=2)


@pytest.mark.parametrize(("ranks", "pieces"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_accumulation_steps_divide_the_same_global_batches(ranks, pieces):
    batches = epoch_batches([True] * 11, 4, seed=0, epoch=0)
    shares = [micro_batches(batches, rank, ranks, pieces) for rank in range(ranks)]
    for number, batch in enumerate(batches):
        parts = [share[number * pieces : (number + 1) * pieces] for share in shares]
        assert sorted(index for part in parts for piece in part for index in piece) == sorted(batch)


def test_a_batch_that_ranks_cannot_divide_is_an_error():
    with pytest.raises(ValueError, match=r"train.batch_size: expected a multiple of 3 .*, got 4"):
        micro_batches([[0, 1, 2, 3]], rank=0, ranks=3, pieces=1)


def test_learning_rate_warms_up_and_drops():
    config = small_config({"train.epochs": 10, "train.warmup_steps": 4, "train.drop_at": 0.8}).train
    factors = [Progress(step=step).learning_rate_factor(5, config) for step in range(50)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[39:41] == [1.0, 0.1] and factors[-1] == 0.1


def test_a_time_budget_drops_the_rate_and_ends_the_run_with_an_evaluation(tmp_path, data):
    config = small_config({"train.time_budget": 100.0, "train.warmup_steps": 0}).train
    assert Progress(step=1, elapsed=79.0).learning_rate_factor(50, config) == 1.0
    assert Progress(step=1, elapsed=80.0).learning_rate_factor(50, config) == 0.1
    training = new_training(tmp_path / "run", data, {"train.time_budget": 1e-6, "train.epochs": 1000})
    training.fit()
    assert [(r["kind"], r["step"]) for r in training.run.records()] == [("step", 1), ("epoch", 1)]
    assert "AP" in training.run.records()[-1] and training.run.best.is_file()
    again = resumed(tmp_path / "run", data, {"train.time_budget": 1e-6, "train.epochs": 1000})
    again.fit()
    assert again.progress.step == 1


def test_evaluation_may_be_rarer_and_always_ends_the_run(tmp_path, data):
    training = new_training(tmp_path / "run", data, {"train.eval_every": 2, "train.epochs": 3})
    training.fit()
    assert ["AP" in r for r in training.run.records() if r["kind"] == "epoch"] == [False, True, True]


INSIDE = {"train.steps": 6, "train.eval_steps": 2, "train.checkpoint_every": 100}


def test_a_number_of_steps_ends_the_run_and_evaluations_come_inside_an_epoch(tmp_path, data):
    training = new_training(tmp_path / "run", data, {**INSIDE, "train.epochs": 1, "train.drop_at": 0.5})
    training.fit()
    records = training.run.records()
    scored = [(record["kind"], record["step"]) for record in records if "AP" in record]
    assert scored == [("evaluation", 2), ("epoch", 4), ("epoch", 6)] and training.epochs == 2
    rates = [record["learning_rate"] for record in records if record["kind"] == "step"]
    assert rates == pytest.approx([1e-3 * (n + 1) / 50 * (0.1 if n >= 3 else 1) for n in range(6)])
    for before, after in pairwise(records):
        assert after["seconds"] > before["seconds"]
        assert (after["kind"] != "step") == (after["train_seconds"] == before["train_seconds"])


@pytest.mark.parametrize(("function", "call"), [("evaluate", 1), ("record", 3), ("record", 4)])
def test_a_run_killed_around_an_evaluation_inside_an_epoch_continues(tmp_path, data, monkeypatch, function, call):
    whole = new_training(tmp_path / "whole", data, INSIDE)
    whole.fit()
    training = new_training(tmp_path / "run", data, INSIDE)
    strike_at(call, Run if function == "record" else training_module, function, training.fit, monkeypatch)
    again = resumed(tmp_path / "run", data, INSIDE)
    assert [record["kind"] for record in again.run.records()] == ["step", "step"]
    again.fit()
    assert_same_run(again, whole)


def test_one_epoch_without_routing_leaves_lambda_and_alpha_at_zero(tmp_path, data):
    training = new_training(tmp_path / "run", data, {"detector.route": False})
    steps = training.steps()
    values = [step.read(training.accelerator) for step in steps]
    assert len(values) == 4
    assert {(v["routing_strength"], v["aux_weight"]) for v in values} == {(0.0, 0.0)}


def test_a_folder_with_a_run_is_not_written_over(tmp_path, data, uninterrupted):
    before = {file: file.read_bytes() for file in uninterrupted.run.folder.iterdir()}
    with pytest.raises(RunError, match="already holds a run"):
        new_training(uninterrupted.run.folder, data)
    assert {file: file.read_bytes() for file in uninterrupted.run.folder.iterdir()} == before
    with pytest.raises(RunError, match="nothing to resume"):
        resumed(tmp_path / "nowhere", data)
    assert not (tmp_path / "nowhere").exists()


def test_resume_notices_other_data_and_another_model(tmp_path, data):
    new_training(tmp_path / "run", data)
    other = coco_layout(write_data(tmp_path / "other", train_images=9))
    changed = {**data, "train_json": str(other.train.annotations), "train_images": str(other.train.images)}
    with pytest.raises(CheckpointError, match="the training set's images have changed"):
        resumed(tmp_path / "run", changed)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        resumed(tmp_path / "run", data, {"detector.ffn_dim": 48})


def _moved_box(folder):
    return _edited(folder / "annotations" / "instances_train2017.json", lambda content: content["annotations"][0])


def _moved_box_of_validation(folder):
    return _edited(folder / "annotations" / "instances_val2017.json", lambda content: content["annotations"][-1])


def _edited(file, chosen):
    content = json.loads(file.read_text())
    chosen(content)["bbox"][0] += 1
    file.write_text(json.dumps(content))


def _other_picture(folder):
    Image.new("RGB", (64, 64)).save(folder / "train2017" / "1.png")


@pytest.fixture
def moved(data, tmp_path):
    """The data in another place, under the names that they had."""
    root = Path(data["train_images"]).parent
    shutil.copytree(root, tmp_path / "moved")
    return {name: path.replace(str(root), str(tmp_path / "moved")) for name, path in data.items()}


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (_moved_box, "training set's annotations"),
        (_moved_box_of_validation, "validation set's annotations"),
        (_other_picture, "training set's images"),
    ],
)
def test_resume_notices_data_that_were_edited(tmp_path, data, moved, edit, what):
    new_training(tmp_path / "run", data)
    edit(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"last.pt: the {what} have changed since the run began"):
        resumed(tmp_path / "run", moved)


def test_data_that_have_moved_are_the_same_data(tmp_path, data, moved, uninterrupted):
    shutil.copytree(uninterrupted.run.folder, tmp_path / "run")
    continued = resumed(tmp_path / "run", moved)
    assert_same_run(continued, uninterrupted)
    for file in ("last.pt", "best.pt"):
        assert load_checkpoint(tmp_path / "run" / file)["data"] == moved
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == moved


def test_a_checkpoint_without_an_identity_resumes_where_its_data_were(tmp_path, data, moved):
    """Those of earlier versions; from then on they have one."""
    training = new_training(tmp_path / "run", data)
    before = load_checkpoint(training.run.last)
    del before["base"]
    digests = before.pop("digests")
    save_checkpoint(training.run.last, before)
    with pytest.raises(
        CheckpointError, match=r"does not tell what its data hold, only where they were: .*train2017.json"
    ):
        resumed(tmp_path / "run", moved)
    resumed(tmp_path / "run", data)
    assert load_checkpoint(training.run.last)["digests"] == digests


def test_config_json_gives_the_configuration_back(uninterrupted):
    written = json.loads((uninterrupted.run.folder / "config.json").read_text())
    assert written["detector"]["num_classes"] == 2
    assert {key: written[key] for key in ("detector", "schedule", "train", "transforms")} == json.loads(
        json.dumps(uninterrupted.config.to_dict())
    )
