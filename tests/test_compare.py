"""`route-detr compare`: arms, runs side by side that go on where they were stopped, and what is written of them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_training import SMALL, options, write_data

from route_detr.cli import main
from route_detr.compare import report, sitting
from route_detr.compare.arms import KNOWN, Arm, as_words, parsed_arms
from route_detr.compare.sitting import MEASURED, Member, Sitting, train_all
from route_detr.config import preset
from route_detr.errors import Interrupted, RunFailed, UsageError
from route_detr.evaluation import METRICS
from route_detr.files import kind_of
from route_detr.run import Run

STEPS = 6


def test_arms_of_words_and_of_a_file(tmp_path):
    file = tmp_path / "arms.yaml"
    file.write_text("strong: {schedule: {strength: 1.0, warmup: 0}, train.epochs: 2}\ncausal:\n")
    arms = parsed_arms([["base"], ["frozen"], ["mine", "detector.route=false", "train.epochs=3"]], file)
    assert arms == [
        Arm("base", {}),
        Arm("frozen", KNOWN["frozen"]),
        Arm("mine", {"detector.route": False, "train.epochs": 3}),
        Arm("strong", {"schedule.strength": 1.0, "schedule.warmup": 0, "train.epochs": 2}),
        Arm("causal", KNOWN["causal"]),
    ]
    assert as_words(arms[2].changes) == ["detector.route=false", "train.epochs=3"]
    assert [arm.name for arm in parsed_arms(None, None)] == ["plain", "routed"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([["plain"]], "expected two or more, got plain"),
        ([["plain"], ["plain"]], "--arm plain: given twice"),
        ([["a/b"], ["plain"]], "--arm a/b: expected a name of letters"),
        ([["plain", "route"], ["routed"]], "--arm plain route: expected KEY=VALUE"),
    ],
)
def test_bad_arms_are_a_clear_error(given, message):
    with pytest.raises(UsageError, match=message):
        parsed_arms(given, None)


def test_a_bad_file_or_field_names_itself(tmp_path):
    (tmp_path / "arms.yaml").write_text("[1, 2]")
    with pytest.raises(UsageError, match=r"arms.yaml: expected arms, NAME: "):
        parsed_arms(None, tmp_path / "arms.yaml")
    with pytest.raises(UsageError, match=r"--arm x: unknown key 'detector.rout'; did you mean 'detector.route'"):
        Arm("x", {"detector.rout": 1}).config(preset("tiny"), 0)


@pytest.mark.parametrize("base", ["tiny", "dino-r50", "deformable-detr-pp-r50"])
@pytest.mark.parametrize("name", KNOWN)
def test_known_arms_fit_the_presets(name, base):
    config = preset(base)
    if name == "causal" and config.detector.denoising_pairs:
        config = config.updated({"detector.denoising_pairs": 0})
    found = Arm(name, KNOWN[name]).config(config, 4)
    assert found.train.seed == 4 and len(found.differences(config)) <= 3


def at(folder, **changes):
    parts = {"folder": folder, "begins": [], "changes": {}, "base": preset("tiny").updated({"train.steps": STEPS})}
    parts |= {"data": {}, "device": "cpu", "jobs": 2, "threads": 1}
    return Sitting(**(parts | changes))


def test_a_folder_with_another_configuration_is_not_gone_on_with(tmp_path):
    member = Member(at(tmp_path), Arm("plain", {"detector.route": False}), 3)
    member.check()
    config = member.arm.config(member.sitting.base, 3).updated({"detector.num_classes": 2, "train.workers": 9})
    Run(member.folder, writes=True).folder.mkdir()
    Run(member.folder).write_config({**config.to_dict(), "data": {}, "threads": 1})
    member.check()
    Run(member.folder).write_config({**config.updated({"train.batch_size": 5}).to_dict(), "data": {}})
    with pytest.raises(UsageError, match=r"plain-3: was begun with train.batch_size=5, not 8; choose another --name"):
        member.check()


@pytest.fixture
def pretended(monkeypatch):
    """Runs that last as long as the number in their log's name says, and are measured at once."""
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('began'); "
    programs = {"quick": "pass", "fails": "print('route-detr: error: no room'); sys.exit(1)", "long": "time.sleep(60)"}

    def command(member):
        return [sys.executable, "-u", "-c", program + programs[member.arm.name]]

    def measure(member):
        member.folder.mkdir()
        (member.folder / MEASURED).write_text("{}")

    monkeypatch.setattr(Member, "command", command)
    monkeypatch.setattr(Member, "measure", measure)


def members(folder, *names):
    return [Member(at(folder), Arm(name, {}), seed) for seed, name in enumerate(names)]


def test_what_is_done_is_not_done_again(tmp_path, pretended):
    runs = members(tmp_path, "quick", "quick", "quick")
    runs[1].measure()
    train_all(runs)
    assert all(run.done for run in runs) and [run.log.exists() for run in runs] == [True, False, True]
    assert runs[0].share_done() == 1


def test_a_run_that_fails_stops_the_others_and_is_named(tmp_path, pretended):
    runs = members(tmp_path, "long", "fails", "quick")
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"fails-1: route-detr: error: no room \(all of it in .*fails-1.log\)"):
        train_all(runs)
    assert time.monotonic() - began < 40 and not runs[2].log.exists()


def test_a_signal_stops_all_runs(tmp_path, pretended, monkeypatch):
    started = []
    start = Member.start
    monkeypatch.setattr(Member, "start", lambda self: started.append(start(self)) or started[-1])

    def strike():
        while len(started) < 2 or not all("began" in run.log.read_text() for run in runs[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    runs = members(tmp_path, "long", "long", "quick")
    threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
        train_all(runs)
    assert [process.returncode for process in started] == [143, 143]


def test_progress_is_read_from_the_last_whole_line(tmp_path):
    member = Member(at(tmp_path), Arm("a", {}), 0)
    assert member.share_done() == 0
    member.folder.mkdir()
    (member.folder / "metrics.jsonl").write_text('{"kind": "step", "step": 3, "seconds": 5.0}\n{"kind": "st')
    assert member.share_done() == 0.5
    timed = member._replace(sitting=at(tmp_path, base=preset("tiny").updated({"train.time_budget": 20.0})))
    assert timed.share_done() == 0.25


# ---- the real thing --------------------------------------------------------------------------------------------------


def words(root):
    """A comparison of two arms and two seeds, short but for the starts of four processes."""
    small = options({"train.workers": 0, "train.checkpoint_every": 1, "detector.num_queries": 8})
    fields = [word for word in small if not word.startswith("train.epochs")]
    lengths = ["--steps", str(STEPS), "--seeds", "2", "--jobs", "2", "--threads", "1", "--device", "cpu"]
    return ["compare", *fields, *lengths, "--data", str(root), "--name", "two"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison one of whose runs was killed in the middle and that was then told to go on."""
    folder = tmp_path_factory.mktemp("compared")
    root = write_data(folder / "ROOT", train_images=8, val_images=4)
    program = [sys.executable, "-m", "route_detr", *words(root)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with open(folder / "out.txt", "w") as out:
        first = subprocess.Popen(program, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        run = Run(folder / "runs" / "two" / "routed-0")
        while not any(record["step"] >= 2 for record in run.records()):
            assert first.poll() is None, (folder / "out.txt").read_text()
            time.sleep(0.02)
        lock = (run.folder / ".route-detr.lock").read_text()
        os.kill(int(re.match(r"process (\d+)", lock)[1]), signal.SIGKILL)
        assert first.wait() == 1
    said = (folder / "out.txt").read_text()
    again = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    return folder / "runs" / "two", said, again


def test_a_comparison_killed_in_the_middle_goes_on(compared):
    folder, said, again = compared
    assert "route-detr: error: runs/two/routed-0:" in said
    assert again.returncode == 0, again.stderr
    for name in ("plain-0", "plain-1", "routed-0", "routed-1"):
        records = Run(folder / name).records()
        assert [each["step"] for each in records if each["kind"] == "step"] == list(range(1, STEPS + 1))
        assert [each["step"] for each in records if "AP" in each] == list(range(1, STEPS + 1))
        assert kind_of(folder / name / MEASURED) == "JSON"
    # Routing has not begun after the one step of the warm-up: its first evaluations are those of the plain arm.
    plain, routed = (
        [each for each in Run(folder / name).records() if "AP" in each] for name in ("plain-0", "routed-0")
    )
    assert plain[0]["AP"] == routed[0]["AP"] and plain[0]["seconds"] > 0


def test_all_its_files_are_written(compared):
    folder, _, again = compared
    assert [kind_of(folder / name) for name in report.FILES.values()] == ["JSON", "picture", "report"]
    found = json.loads((folder / "compare.json").read_text())
    assert list(found["arms"]) == ["plain", "routed"] and found["seeds"] == [0, 1] and found["jobs"] == 2
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == [
        *(("plain", 0), ("plain", 1), ("routed", 0), ("routed", 1))
    ]
    for place in report.AXES.values():
        assert set(METRICS) < set(found["differences"]["routed"][place])
    assert found["results"]["plain"]["cost"] == 1 and found["results"]["routed"]["seconds_a_step"] > 0
    text = (folder / "compare.md").read_text()
    assert text.partition("\n")[2].strip() == again.stdout.partition("files in")[0].strip()
    assert "- **routed** against plain, equal steps: " in text and "| plain |" in text


def test_the_ap_of_the_end_is_that_of_the_detections(compared):
    """The bootstrap scores what `MEASURED` holds; the curves are of training's own evaluation."""
    folder, _, _ = compared
    for name in ("plain-0", "routed-1"):
        last = [each for each in Run(folder / name).records() if "AP" in each][-1]
        measured = json.loads((folder / name / MEASURED).read_text())["competition"]
        assert measured["AP"] == pytest.approx(last["AP"], abs=1e-6) and measured["images"] == 4


def test_an_arm_beside_itself_gives_exactly_nothing(compared):
    folder, _, _ = compared
    base = preset("tiny").updated({**SMALL, "train.steps": STEPS})
    root = folder.parents[1] / "ROOT"
    data = {"train_json": "", "val_json": str(root / "annotations/instances_val2017.json")}
    here = at(folder, base=base, data=data | {"val_images": str(root / "val2017")})
    for run in ("twin-0", "twin-1"):
        (folder / run).symlink_to(f"routed{run[-2:]}")
    found = report.analysed(here, [Arm("routed", {}), Arm("twin", {})], [0, 1])
    for place in report.AXES.values():
        for metric in METRICS:
            values = found["differences"]["twin"][place][metric].values()
            assert set(values) in ({0.0}, {None})
        assert found["differences"]["twin"][place]["AP_by_seed"] == [0, 0]
    assert "makes no difference with 2 seeds" in report.as_markdown(found)


def test_another_length_is_another_comparison(compared, monkeypatch, capsys):
    folder, _, _ = compared
    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(sitting, "train_all", lambda members: pytest.fail("must not train"))
    threads = torch.get_num_threads()
    given = words(folder.parents[1] / "ROOT")
    given[given.index("--steps") + 1] = "7"
    assert main(given) == 2 and "was begun with train.steps=6, not 7" in capsys.readouterr().err
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("curves", "limit", "expected"),
    [([0.0, 0.2, 0.4], 20, 0.4), ([0.0, 0.2, 0.4], 15, 0.3), ([0.0, 0.2, 0.4], 5, 0.1)],
)
def test_a_curve_is_read_between_its_evaluations(curves, limit, expected):
    import numpy as np

    table = {name: np.array(curves) for name in METRICS} | {"step": np.array([0.0, 10.0, 20.0])}
    assert report.at(table, "step", limit)[0] == pytest.approx(expected)
