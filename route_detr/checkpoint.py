"""Checkpoints: written whole or not at all, read without running any code that they contain.

A checkpoint is one dictionary of tensors and plain containers, so ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from route_detr.errors import CheckpointError, UsageError, WriteError

FORMAT = "route_detr.checkpoint"
VERSION = 2
REQUIRED = ("config", "categories", "model")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = re.compile(r".+\.(\d+)-[0-9a-f]{8}\.tmp")

SOFTWARE = "route-detr"  # in every file that is written: PNG "Software", JSON "software", ONNX producer, pt2 extra file
OUR_BEGINNINGS = re.compile(
    rb"""(?P<nothing>\Z | \[\]\n\Z)  # to lose
    | (?P<configuration>\{\n\ *"software":\ "route-detr",\n\ *"detector":)
    | (?P<JSON>\{\n\ *"software":\ "route-detr")
    | (?P<metrics>\{"kind":\ ")
    | (?P<predictions>\[\n\ \{\n\ \ "image_id":\ .*\n\ \ "file_name":\ .*\n\ \ "category_id":\ .*\n\ \ "category_name":)
    | (?P<checkpoint>PK(?s:.*)route_detr\.checkpoint)
    | (?P<model>\x08(?s:.)\x12\x0aroute-detr)  # ONNX: its version, then its producer""",
    re.VERBOSE,
)


def kind_of(path: str | Path) -> str | None:
    """The kind of a file that this program wrote, told by what is in it; None for others' files.

    "picture", "configuration" (of a run), "JSON" (what else a command found), "metrics", "predictions", "checkpoint",
    "model" (exported), or "nothing" where nothing is in it.
    """
    with suppress(OSError, SyntaxError, ValueError, zipfile.BadZipFile):
        with open(path, "rb") as stream:
            head = stream.read(8192)
        if head.startswith(b"\x89PNG"):
            with Image.open(path) as image:
                return "picture" if image.info.get("Software") == SOFTWARE else None
        if found := OUR_BEGINNINGS.match(head):
            return found.lastgroup
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return "model" if any(name.endswith(f"/extra/{SOFTWARE}") for name in archive.namelist()) else None
    return None


def check_replaceable(kind: str, *paths: str | Path) -> None:
    """Raise `UsageError` naming the first of ``paths`` that cannot be written, or holds anything but a file of this
    kind that this program wrote (`kind_of`). Folders may be missing (`with_folder`)."""
    for path in map(Path, paths):
        folder = next((each for each in path.absolute().parents if each.exists()), Path("/"))
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"{path}: cannot be written, {folder} is no folder that may be written to")
        found = kind_of(path) if path.is_file() else None
        if path.exists() and found not in ("nothing", kind):
            what = "a file that route-detr did not write" if path.is_file() else "no regular file"
            what = what if found is None else f"route-detr's {found} and no {kind}"
            raise UsageError(f"{path}: is {what} and is not replaced; delete it or choose another name")


def with_folder(path: Path) -> Path:
    """The path, whose folder has been made where it was missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(stream)`` on a temporary file in the folder of ``path``, then put it in place in one step.

    A process killed at any moment leaves the old file or the new one under ``path``, never a part of either. Where
    ``path`` is a link, the file that it names is replaced.
    """
    path, target = Path(path), Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # TEMPORARY
    with writing(path):
        try:
            with open(temporary, "xb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself reaches the disk
        finally:
            os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell of an error of the system inside the block in one sentence that names ``path``, also where torch.save hides
    it in an error of its own.

    Raises:
        WriteError: the disk is full, or fails.
        PermissionError: the folder or its disk may not be written to.
        FileNotFoundError: the folder of ``path`` is not there.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or isinstance(cause, WriteError):
            raise
        if isinstance(cause, FileNotFoundError) and not path.parent.exists():
            raise FileNotFoundError(f"{path}: cannot be written, there is no folder {path.parent}") from error
        reason = cause.strerror or str(cause)
        if cause.errno in FULL:
            disk = next(folder for folder in path.absolute().parents if folder.is_mount())
            reason += f", {shutil.disk_usage(disk).free / 2**20:.1f} MiB are free on the disk of {disk}"
        stands = f"; what {path.name} held before stands" if path.is_file() else ""
        kind = PermissionError if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else WriteError
        raise kind(f"{path}: cannot be written: {reason}{stands}") from error


def remove_abandoned(folder: Path) -> None:
    """Delete the temporary files that processes killed in `write_atomically` have left in a folder."""
    for file in folder.glob("*.tmp"):
        found = TEMPORARY.fullmatch(file.name)
        if found and (int(found[1]) == os.getpid() or not _is_alive(int(found[1]))):
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


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


def random_state() -> dict[str, Any]:
    """The states of PyTorch's random number generators, as tensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a ``random_state()``; CUDA states apply where as many devices are visible."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
