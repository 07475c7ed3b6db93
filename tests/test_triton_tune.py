"""`route-kernels tune` with a timer that reads the settings instead of a clock."""

import json

import pytest
import torch

import route_kernels as rk
from route_kernels import cli

pytest.importorskip("triton")

from benchmarks import launches, tune
from route_kernels.triton import block_sizes
from route_kernels.triton.block_sizes import INTERPRETER, TABLE, Entry

KERNEL = "query_similarity_relu"
CASE = tune.Case("query_similarity", "small", torch.float32, dict(batch=1, queries=5, channels=4))
CPU = torch.device("cpu")
CIRCUMSTANCES = {"gpu": "a GPU"}
needs_interpreter = pytest.mark.skipif(
    not rk.can_run("query_similarity", "triton", torch.empty(0))[0], reason="this run has a GPU"
)


def settings(num_warps=4, num_stages=2, block=16):
    return {"BLOCK_N": block, "BLOCK_C": 16, "num_warps": num_warps, "num_stages": num_stages}


@pytest.fixture
def table(monkeypatch):
    """Two entries that could run, one of another dtype, and the interpreter's."""
    rows = (
        Entry(settings(1, 1), (INTERPRETER,)), Entry(settings(4, 2), ("sm80",)), Entry(settings(4, 3, 32)),
        Entry(settings(8, 2), dtypes=(torch.float16,)), Entry(settings(4, 2), ("sm90",)),
    )  # fmt: skip
    monkeypatch.setitem(TABLE, KERNEL, rows)


def fake_timer(cost, seen):
    """Runs the step and asks what its launches would get."""

    def timer(step):
        step()
        found = block_sizes.config(KERNEL, CPU, torch.float32, N=5, C=4, ODD=1)
        seen.append(found)
        return cost(found)

    return timer


def test_entries_of_other_dtypes_and_the_interpreter_are_no_candidates(table):
    lookup = launches.Lookup(KERNEL, torch.float32, (("N", 5),))
    assert tune.entries(lookup) == [settings(4, 2), settings(4, 3, 32)]


def test_neighbours_stay_within_what_a_gpu_takes():
    assert tune.neighbours(settings(4, 2)) == [settings(2, 2), settings(8, 2), settings(4, 1), settings(4, 3)]
    assert tune.neighbours(settings(1, 1)) == [settings(2, 1), settings(1, 2)]
    assert tune.neighbours(settings(8, 5)) == [settings(4, 5), settings(8, 4)]


@needs_interpreter
def test_the_fastest_is_chosen_and_its_neighbours_are_tried(table):
    seen = []
    times = {(4, 3, 32): 2.0, (2, 3, 32): 1.0}

    def cost(found):
        return times.get((found["num_warps"], found["num_stages"], found["BLOCK_N"]), 3.0)

    (choice,) = tune.tune(CASE, CPU, fake_timer(cost, seen))
    assert choice == tune.Choice("query_similarity_relu float32 C=4 N=8 ODD=1", settings(2, 3, 32), 1.0, 3.0)
    assert settings(4, 2) in seen and settings(8, 2) not in seen
    assert launches._forced == {}


@needs_interpreter
def test_nothing_is_chosen_where_nothing_is_faster(table):
    assert tune.tune(CASE, CPU, fake_timer(lambda found: 1.0, [])) == []
    assert list(tune.report(CASE, [])) == [
        "query_similarity, small, float32", "  nothing is faster than what is in use",
    ]  # fmt: skip


@needs_interpreter
def test_what_does_not_fit_the_gpu_is_passed_over(table):
    from triton.runtime.errors import OutOfResources

    def cost(found):
        if found["BLOCK_N"] == 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return {4: 2.0, 8: 1.0}.get(found["num_warps"], 3.0)

    (choice,) = tune.tune(CASE, CPU, fake_timer(cost, []))
    assert choice.settings == settings(8, 2)


@needs_interpreter
def test_other_errors_are_not(table):
    def cost(found):
        if found["BLOCK_N"] == 32:
            raise RuntimeError("illegal memory access")
        return 1.0

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.tune(CASE, CPU, fake_timer(cost, []))
    assert launches._forced == {}


def test_choices_are_added_to_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv(block_sizes.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(block_sizes, "circumstances", lambda device: CIRCUMSTANCES)
    tune.keep(CPU, [tune.Choice("a", settings(1), 1, 2), tune.Choice("b", settings(2), 1, 2)])
    tune.keep(CPU, [tune.Choice("b", settings(4), 1, 2)])
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert content == {"circumstances": CIRCUMSTANCES, "rows": {"a": settings(1), "b": settings(4)}}


def test_cases_are_of_dtypes_that_the_kernels_take():
    found = list(tune.cases(["query_similarity"], [torch.float64, torch.float16]))
    assert {case.dtype for case in found} == {torch.float16}
    assert {case.name for case in found} == set(tune.SIZES["query_similarity"])
    assert set(tune.SIZES) == set(rk.backends.OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this run has a GPU")
def test_without_a_gpu_the_command_says_so_in_one_line(monkeypatch, capsys):
    assert tune.main(["--op", "query_similarity"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("route-kernels tune: needs a GPU: ")
    assert printed.err.count("\n") == 1


def test_the_command_tunes_and_keeps(monkeypatch, tmp_path, capsys, table):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(rk, "can_run", lambda *args: (True, "as if"))
    monkeypatch.setenv(block_sizes.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(block_sizes, "circumstances", lambda device: CIRCUMSTANCES)
    choice = tune.Choice("key", settings(), 1.0, 2.0)
    monkeypatch.setattr(tune, "tune", lambda case, device, timer: [choice])
    assert tune.main(["--op", "query_similarity", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "2.0000 -> 1.0000 ms  key: BLOCK_N=16, BLOCK_C=16, num_warps=4, num_stages=2" in printed
    assert printed.endswith(f"kept in {tmp_path / 'tuned.json'}\n")
    assert json.loads((tmp_path / "tuned.json").read_text())["rows"] == {"key": settings()}


def test_the_command_runs_the_tuner_of_the_checkout(monkeypatch):
    called = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command, cwd: called.append((command[1:], cwd)) or 0)
    assert cli.main(["tune", "--op", "query_similarity"]) == 0
    assert called == [(["-m", "benchmarks", "tune", "--op", "query_similarity"], cli.CHECKOUT)]
