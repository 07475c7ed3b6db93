import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from route_detr.errors import CheckpointError, WriteError
from route_detr.files import remove_abandoned, write_atomically, write_text
from route_detr.run import load_checkpoint, save_checkpoint

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
        from route_detr.files import write_atomically
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
    being_written = tmp_path / f"config.json.{os.getppid()}-0123abcd.tmp"  # by a process that lives
    being_written.touch()
    remove_abandoned(tmp_path)
    being_written.unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_two_that_write_at_once_use_files_of_their_own(tmp_path):
    path = tmp_path / "config.json"

    def while_another_writes(stream):
        stream.write(b"first")
        write_text(path, "second")
        assert path.read_text() == "second"

    write_atomically(path, while_another_writes)
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_link_stays_and_the_file_that_it_names_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "last.pt").symlink_to("disk/real.pt")
    for step in (1, 2):
        save_checkpoint(tmp_path / "last.pt", {**STATE, "step": step})
        assert load_checkpoint(tmp_path / "disk" / "real.pt")["step"] == step
    assert (tmp_path / "last.pt").is_symlink()


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
        lambda path: zipfile.ZipFile(path, "w").writestr("word/document.xml", "<w:document/>"),
        _truncated,
        _flipped,
        lambda path: save_checkpoint(path, {**STATE, "model": {"w": torch.ones(3), "v": torch.tensor([1, math.nan])}}),
        lambda path: save_checkpoint(path, {**STATE, "model": {"running_var": torch.tensor(-math.inf).half()}}),
        lambda path: None,
    ],
    ids=[
        "text",
        "empty",
        "pickle",
        "code",
        "foreign",
        "list",
        "version",
        "incomplete",
        "zip",
        "cut",
        "spoilt",
        "NaN",
        "infinity",
        "absent",
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, spoil, capfd):
    path = tmp_path / "some.pt"
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "must never run" not in capfd.readouterr().out


def test_a_byte_that_has_changed_is_told_wherever_it_lies(tmp_path):
    """torch.load reads such a file as if nothing were wrong."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {**STATE, "model": {"w": torch.arange(50.0), "v": torch.ones(9, dtype=torch.int64)}})
    whole, told = path.read_bytes(), 0
    expected = load_checkpoint(path)
    for position in range(0, len(whole), 31):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            told += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
        else:  # a byte between the records, or of a date
            assert all(torch.equal(value, expected["model"][name]) for name, value in found["model"].items())
            assert {**found, "model": 0} == {**expected, "model": 0}
    weights = whole.index(torch.arange(50.0).numpy().tobytes()) + 101
    path.write_bytes(whole[:weights] + b"\xff" + whole[weights + 1 :])
    with pytest.raises(CheckpointError, match=r"data/[01] has changed since it was written, its checksum differs"):
        load_checkpoint(path)
    assert told > 20


def test_the_cause_of_what_cannot_be_read_is_named_whole(tmp_path):
    torch.save({"epoch": np.float64(3)}, tmp_path / "scalar.pt")
    with pytest.raises(
        CheckpointError, match=r"\(Unsupported global: GLOBAL numpy\S+ was not an allowed global by def"
    ):
        load_checkpoint(tmp_path / "scalar.pt")
    torch.save({"model": Dangerous()}, tmp_path / "code.pt")
    with pytest.raises(
        CheckpointError, match=r"\(Trying to load unsupported GLOBAL posix.system whose module posix is b"
    ):
        load_checkpoint(tmp_path / "code.pt")


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 20 kB: what the system tells is as on a full disk, the number of the error aside."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_what_stands(tmp_path, full_disk):
    path = tmp_path / "last.pt"
    large = {**STATE, "model": {"w": torch.zeros(20_000)}}
    with pytest.raises(
        WriteError, match=r"last.pt: cannot be written: File too large, [\d.]+ MiB are free on .* /\S*$"
    ):
        save_checkpoint(path, large)
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(path, STATE)
    for write in (lambda: save_checkpoint(path, large), lambda: write_text(path, "x" * 30_000)):
        with pytest.raises(WriteError, match=r"; what last.pt held before stands$"):
            write()
    assert load_checkpoint(path)["step"] == 5 and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named_and_not_the_temporary_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval.json: cannot be written, there is no folder .*nodir$"):
        write_text(tmp_path / "nodir" / "eval.json", "{}")
