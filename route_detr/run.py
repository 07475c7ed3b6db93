"""The folder of one training run: configuration, metrics, TensorBoard events, checkpoints, pictures."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from route_detr.errors import CheckpointError, RunError
from route_detr.files import SOFTWARE, check_replaceable, remove_abandoned, write_atomically, write_text, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "route_detr.checkpoint"
VERSION = 2
REQUIRED = ("config", "categories", "model")
PICTURES = ("curves.png", "detections.png", "routing.png")


class Run:
    """One folder. ``last.pt`` decides whether a run exists; everything else follows from it.

    Only the first of several ranks ``writes``; what the others record or save goes nowhere.
    """

    def __init__(self, folder: str | Path, writes: bool = True) -> None:
        self.folder, self.writes = Path(folder), writes
        self.metrics_file = self.folder / "metrics.jsonl"
        self.last = self.folder / "last.pt"
        self.best = self.folder / "best.pt"
        self._events: SummaryWriter | None = None
        self._lock_file, self._lock = self.folder / ".route-detr.lock", None  # the descriptor of that file

    def check_new(self) -> None:
        """Raise `RunError` when the folder holds a run already, or anything else that would be written over."""
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder}: is a file, not a run folder")
        for file in (self.last, self.best, self.metrics_file):
            if file.exists():
                raise RunError(
                    f"{self.folder}: already holds a run ({file.name}); use --resume to continue it, or another --name"
                )
        check_replaceable("configuration", self.folder / "config.json")
        check_replaceable("picture", *(self.folder / name for name in PICTURES))

    def check_resumable(self) -> None:
        """Raise `RunError` when there is nothing to continue."""
        if not self.last.is_file():
            raise RunError(f"{self.folder}: nothing to resume, no last.pt; start the run without --resume")

    def lock(self) -> None:
        """Create the folder and keep other processes from training in it, until `close` or until this process ends.

        The lock is the process's alone: workers of a killed run, which may outlive it, do not hold it. Network file
        systems know such locks too; where one or the system does not, a warning says so.

        Raises:
            RunError: another process has the lock.
        """
        if not self.writes or self._lock is not None:
            return
        with writing(self._lock_file):
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._lock is None:
                opened = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
                unlocked = _why_unlocked(opened)
                if unlocked == errno.EAGAIN:
                    holder = os.read(opened, 1000).decode(errors="replace").strip() or "another process"
                    os.close(opened)
                    raise RunError(f"{self.folder}: {holder} is training in it; wait for its end, or stop it first")
                if unlocked:
                    reason = os.strerror(unlocked)
                    warnings.warn(f"{self.folder}: cannot be locked ({reason}), start no second process", stacklevel=2)
                if self._lock_file.exists() and os.path.samestat(self._lock_file.stat(), os.fstat(opened)):
                    self._lock = opened
                else:  # its holder has unlinked it since it was opened
                    os.close(opened)
            os.ftruncate(self._lock, 0)
            os.write(self._lock, f"process {os.getpid()} on {platform.node()}\n".encode())
        remove_abandoned(self.folder)

    def write_config(self, config: Mapping[str, Any]) -> None:
        if self.writes:
            write_text(self.folder / "config.json", json.dumps({"software": SOFTWARE, **config}, indent=2) + "\n")

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Write ``last.pt``; before it ``best.pt`` when ``best``, so that a kill between them loses neither."""
        if self.writes and best:
            save_checkpoint(self.best, state)
        if self.writes:
            save_checkpoint(self.last, state)

    def amend(self, changes: dict[str, Any]) -> None:
        """Replace entries of the checkpoints."""
        for file in (self.best, self.last):
            if self.writes and file.exists():
                save_checkpoint(file, load_checkpoint(file) | changes)

    def records(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl; a line torn by a kill is left out."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind(self, epoch: int, step: int) -> None:
        """Drop what was recorded after a checkpoint of ``step`` steps and ``epoch`` finished epochs.

        An evaluation inside an epoch comes after the checkpoint of its step.
        """
        if not self.writes:
            return
        kept = [
            json.dumps(record) + "\n"
            for record in self.records()
            if (
                record["epoch"] < epoch
                if record["kind"] == "epoch"
                else record["step"] < step + (record["kind"] == "step")
            )
        ]
        write_text(self.metrics_file, "".join(kept))
        with writing(self.folder):
            self._events = SummaryWriter(str(self.folder), purge_step=step + 1)

    def record(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and its numbers to the TensorBoard events.

        ``record`` has ``kind`` ("step" or "epoch"), ``epoch``, ``step`` and numbers, which may be None.
        """
        if not self.writes:
            return
        with writing(self.metrics_file), open(self.metrics_file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        with writing(self.folder):
            if self._events is None:
                self._events = SummaryWriter(str(self.folder))
            for name, value in record.items():
                if name not in ("kind", "epoch", "step") and value is not None:
                    self._events.add_scalar(f"{record['kind']}/{name}", value, record["step"])
            if record["kind"] == "epoch":
                self._events.flush()

    def draw(self, name: str, plot: Callable[[Path], object]) -> list[str]:
        """Let ``plot`` write the picture ``name``; one that fails is a warning. Returns the names that are there."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as an empty box
                plot(self.folder / name)
        except Exception as error:  # whatever a class name or an image makes of a plot
            warnings.warn(f"{self.folder / name}: not drawn: {type(error).__name__}: {error}", stacklevel=2)
            return []
        return [name]

    def close(self) -> None:
        """Finish the events and give the lock back."""
        events, self._events = self._events, None
        if events is not None:
            try:
                events.close()
            except OSError as error:
                warnings.warn(f"{self.folder}: the last TensorBoard events are lost: {error}", stacklevel=2)
        if self._lock is not None:
            self._lock_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _why_unlocked(descriptor: int) -> int:
    """Lock an open file; 0, or the number of the error: EAGAIN where another process holds the lock."""
    if fcntl is None:
        return errno.ENOSYS
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return errno.EAGAIN if error.errno == errno.EACCES else error.errno
    return 0


def find_run(name: str | Path, runs: str | Path = "runs") -> Path:
    """The folder meant by a path or by the name of a run below ``runs``."""
    for folder in (Path(name), Path(runs) / name):
        if folder.is_dir():
            return folder
    raise RunError(f"{name}: no such run folder, here or below {runs}/")


def find_checkpoint(name: str | Path, which: str = "best", runs: str | Path = "runs") -> Path:
    """A checkpoint file: ``name`` itself, or ``which`` ("best" or "last") of the run that ``name`` means."""
    if Path(name).is_file():
        return Path(name)
    return find_run(name, runs) / f"{which}.pt"


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, tuples and dicts only) to ``path``, whole or not at all."""
    complete = {"format": FORMAT, "version": VERSION, **state}
    write_atomically(path, lambda stream: torch.save(complete, stream))


def not_finite(model: Mapping[str, Any]) -> str:
    """How many tensors of a state dict hold NaN or infinity, and the first of them; empty when none does."""
    floating = {name: value for name, value in model.items() if isinstance(value, Tensor) and value.is_floating_point()}
    spoilt = [
        name
        for name, value in floating.items()
        if value.numel() and not all(math.isfinite(extreme) for extreme in value.aminmax())
    ]
    return f"{len(spoilt)} of {len(model)} tensors hold NaN or infinity, the first is {spoilt[0]}" if spoilt else ""


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: there is no such file, it is damaged, foreign, of another version, or its model is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        _compare_checksums(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler or the zip reader
        why = f"it is damaged or holds more than tensors ({why_unreadable(error)})"
        raise CheckpointError(f"{path}: cannot be read as a checkpoint; {why}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint written by route-detr")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: checkpoint format {state.get('version')}, this program reads format {VERSION}")
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise CheckpointError(f"{path}: incomplete checkpoint, without {', '.join(missing)}")
    if spoilt := not_finite(state["model"]):
        raise CheckpointError(f"{path}: its model has diverged: {spoilt}")
    return state


def _compare_checksums(path: Path) -> None:
    """Raise `zipfile.BadZipFile` where a byte of the file has changed, which torch.load does not notice."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
        if record is not None:
            raise zipfile.BadZipFile(f"{record} has changed since it was written, its checksum differs")


def why_unreadable(error: Exception) -> str:
    """The cause in an error of torch.load, without the advice around it."""
    text = str(error).strip()
    named = re.search(r"(?:Unsupported|Trying to load unsupported) .*?(?=\. Please|\n|$)", text)
    if named is None and (cause := re.search(r"WeightsUnpickler error:\s+(.+)", text)):
        return cause[1]
    return named[0] if named else text.partition("\n")[0] or f"{type(error).__name__}, the file may be empty"
