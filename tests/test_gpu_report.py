"""`gpu_report`: a stuck part is ended with all that it started, what was measured stays, no GPU is one line."""

import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_parts import LAUNCH, PARTS, PROFILE, STEP, TRAINING
from benchmarks.gpu_report import Part, Report, run_part, run_parts

ROOT = Path(gpu_report.__file__).parents[1]
ROW = {"kind": "speed", "op": "routed_attention", "case": "small", "pass": "forward", "failure": None, "contenders": {}}


def part(name, code, seconds=30.0):
    return Part(name, [sys.executable, "-c", textwrap.dedent(code)], seconds)


def printing(*rows, name="attention", then=""):
    lines = "".join(f"print({json.dumps(json.dumps(row))}, flush=True)\n" for row in rows)
    return part(name, lines + textwrap.dedent(then))


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "gpu.json", {"commit": None})


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "gpu.log").open("w") as file:
        yield file


def on_disk(report):
    return json.loads(report.path.read_text())


def gone(process):
    """Whether that process has ended; one that nobody has waited for yet counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_rows_are_on_disk_while_the_part_runs(report, log):
    seen = []

    def on_row(row):
        report.add(row)
        seen.append(on_disk(report)["speed"][-1]["case"])

    outcome = run_part(printing(ROW, {**ROW, "case": "large"}), 30.0, on_row, log)
    assert outcome["status"] == "done" and seen == ["small", "large"]
    assert "kind" not in on_disk(report)["speed"][0]


STUCK = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"pids {os.getpid()} {child.pid}", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks up processes in /proc")
def test_a_stuck_part_is_ended_and_its_rows_stay(report, log, tmp_path):
    for seconds in (2.0, 10.0, 60.0):  # more where the machine is too busy to print the row so soon
        outcome = run_part(printing(ROW, then=STUCK), seconds, report.add, log)
        assert outcome["status"] == f"stopped after {seconds:.0f} s"
        if "pids" in (tmp_path / "gpu.log").read_text():
            break
    assert [row["case"] for row in on_disk(report)["speed"]] == ["small"]
    (line,) = (line for line in (tmp_path / "gpu.log").read_text().splitlines() if line.startswith("pids"))
    waited = time.monotonic()
    while not all(gone(process) for process in map(int, line.split()[1:])):
        assert time.monotonic() - waited < 60
        time.sleep(0.01)


def test_the_next_part_runs_after_one_that_was_stopped_or_failed(report, log, capsys):
    parts = [
        Part("stuck", part("stuck", "import time; time.sleep(600)").command, 0.5),
        Part("failing", part("failing", "raise SystemExit(3)").command, 20.0),
        Part("missing", [sys.executable, "-m", "no_such_module_here"], 20.0),
        printing({**ROW, "case": "last"}, name="last"),
    ]
    run_parts(parts, report, log)
    statuses = {name: outcome["status"] for name, outcome in on_disk(report)["parts"].items()}
    stopped = statuses.pop("stuck")
    assert stopped.startswith("stopped after")
    assert statuses == {"failing": "ended with 3", "missing": "ended with 1", "last": "done"}
    assert on_disk(report)["speed"][0]["case"] == "last"
    assert "failing: ended with 3" in capsys.readouterr().out


def test_time_that_is_left_goes_to_the_parts_that_follow(report, log, monkeypatch):
    given = []
    monkeypatch.setattr(
        gpu_report, "run_part", lambda part, seconds, *_: given.append(seconds) or {"status": "done", "seconds": 0}
    )
    run_parts([Part("a", [], 10.0), Part("b", [], 20.0), Part("c", [], 5.0)], report, log)
    assert given == pytest.approx([10.0, 30.0, 35.0], abs=0.5)


def test_all_parts_together_take_less_than_nine_minutes():
    parts = gpu_report.the_parts()
    assert (
        sum(part.seconds + 2 * gpu_report.SECONDS_TO_END for part in parts[-1:])
        + sum(part.seconds for part in parts[:-1])
        < 9 * 60
    )
    names = [part.name for part in parts]
    assert names[:6] == ["build", "tests", "attention", "flex", "ms_deform_attn", "ms_deform_attn_fused"]
    assert set(names) == {"build", "tests", *PARTS}
    assert all(part.command[0] == sys.executable for part in parts)


def test_peers_come_out_of_a_folder_of_wheels(tmp_path, monkeypatch, log):
    monkeypatch.setattr(gpu_report, "INSTALLED", tmp_path / "installed")
    with zipfile.ZipFile(tmp_path / "a_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer.py", "SAYS = 'here'\n")
        wheel.writestr("a_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\n")
        wheel.writestr("a_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("a_peer-1.0.dist-info/RECORD", "")
    first, *_ = gpu_report.the_parts(tmp_path)
    assert first.name == gpu_report.PEERS
    assert run_part(first, 60.0, lambda row: None, log)["status"] == "done"
    rows = []
    code = "import a_peer, json; print(json.dumps({'kind': a_peer.SAYS}))"
    assert run_part(part("attention", code), 60.0, rows.append, log)["status"] == "done"
    assert rows == [{"kind": "here"}]


def test_every_kind_of_row_has_its_place(report):
    for kind in ("speed", LAUNCH, "ceiling", PROFILE, STEP, TRAINING):
        report.add({"kind": kind, "op": kind})
    report.add({"kind": "test", "test": "t::a", "outcome": "passed", "seconds": 0.1})
    report.add({"kind": "test", "test": "t::b", "outcome": "skipped", "reason": "no second GPU", "seconds": 0.0})
    report.add({"kind": "test", "test": "t::c", "outcome": "failed", "reason": "wrong", "seconds": 0.1})
    report.write()
    results = on_disk(report)
    assert [len(results[name]) for name in ("speed", "launch", "ceilings", "profiles", "steps", "trainings")] == [1] * 6
    assert results["tests"] == {
        "passed": 1, "failed": [{"test": "t::c", "reason": "wrong"}], "skipped": {"no second GPU": 1},
    }  # fmt: skip
    assert gpu_report.tests_line(results["tests"]) == "tests: 1 passed, 1 failed, 1 skipped"


def test_the_file_is_replaced_as_a_whole(report, monkeypatch):
    before = on_disk(report)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        report.add(ROW)
    assert on_disk(report) == before


@pytest.mark.parametrize("line", ["", "text", "{not json", '{"no kind": 1}', '["kind"]'])
def test_other_output_is_no_row(line):
    assert gpu_report._row(line) is None


def test_names_of_folders():
    assert gpu_report.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_report.folder_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert gpu_report.main(["--out", str(tmp_path / "results")]) == gpu_report.NO_GPU
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no GPU" in printed.err
    assert not (tmp_path / "results").exists()


TESTS = """
import pytest

def test_right():
    print("captured")

def test_wrong():
    assert 1 + 1 == 3

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise ValueError("set-up")

def test_without_its_fixture(broken):
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_outcomes_of_tests_are_lines(tmp_path, report, log, workers):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_sample.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_report", "-q", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, *workers, str(tmp_path / "test_sample.py")]
    outcome = run_part(Part("tests", command, 120.0), 120.0, report.add, log)
    assert outcome["status"] == "ended with 1"
    report.write()
    tests = on_disk(report)["tests"]
    assert tests["passed"] == 1 and tests["skipped"] == {"not today": 1}
    reasons = {each["test"].rpartition("::")[2]: each["reason"] for each in tests["failed"]}
    assert set(reasons) == {"test_wrong", "test_without_its_fixture"}
    assert "assert 1 + 1 == 3" in reasons["test_wrong"] and "set-up" in reasons["test_without_its_fixture"]


def test_gpu_tests_are_collected_by_the_report_s_command():
    command = next(part.command for part in gpu_report.the_parts() if part.name == "tests")
    assert command[-1] == "tests/test_gpu.py" and "gpu" in command[command.index("-m", 3) + 1 :]
    done = subprocess.run(
        [*(word for word in command if word not in gpu_report._workers()), "--collect-only"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_graph_replay" in done.stdout
