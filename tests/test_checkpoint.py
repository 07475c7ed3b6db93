import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from route_detr.checkpoint import (
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    write_atomically,
    write_text,
)
from route_detr.errors import CheckpointError

ROOT = Path(__file__).parents[1]
STATE = {"config": {"a": 1}, "categories": [{"id": 3, "name": "x"}], "model": {"w": torch.arange(3.0)}, "step": 5}


def test_round_trip_needs_no_code_in_the_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["w"], STATE["model"]["w"])
    assert (loaded["config"], loaded["categories"], loaded["step"]) == ({"a": 1}, STATE["categories"], 5)
    assert torch.load(path, weights_only=True)["format"] == "route_detr.checkpoint"
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()

    def torn(stream):
        stream.write(b"half a checkpoint")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, torn)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    write_text(path, "old")
    program = """
        import os, signal, sys
        from route_detr.checkpoint import write_atomically
        def torn(stream):
            stream.write(b"new, but only ha")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(sys.argv[1], torn)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "newer")
    assert path.read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


class Dangerous:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def _truncated(path):
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path):
    save_checkpoint(path, STATE)
    path.write_bytes(b"\0" * 64 + path.read_bytes()[64:-64] + b"\0" * 64)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("not a checkpoint"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps(Dangerous())),
        lambda path: torch.save({"format": "route_detr.checkpoint", "version": 1, "model": Dangerous()}, path),
        lambda path: torch.save({"state_dict": {}}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({**STATE, "format": "route_detr.checkpoint", "version": 99}, path),
        lambda path: torch.save({"format": "route_detr.checkpoint", "version": 1, "model": {}}, path),
        _truncated,
        _flipped,
        lambda path: None,
    ],
    ids=["text", "empty", "pickle", "code", "foreign", "list", "version", "incomplete", "cut", "spoilt", "absent"],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, spoil, capfd):
    path = tmp_path / "some.pt"
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "must never run" not in capfd.readouterr().out


def test_random_state_survives_a_file(tmp_path):
    torch.manual_seed(3)
    torch.rand(5)
    save_checkpoint(tmp_path / "r.pt", {**STATE, "random": random_state()})
    expected = torch.rand(4)
    torch.manual_seed(99)
    restore_random_state(load_checkpoint(tmp_path / "r.pt")["random"])
    assert torch.equal(torch.rand(4), expected)
