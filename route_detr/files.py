"""Files of this package: what stands at a path, and how a new one is put there, whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from route_detr.errors import UsageError, WriteError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = re.compile(r".+\.(\d+)-[0-9a-f]{8}\.tmp")

SOFTWARE = "route-detr"  # in every file that is written: PNG "Software", JSON "software", ONNX producer, pt2 extra file
OUR_BEGINNINGS = re.compile(
    rb"""(?P<nothing>\Z | \[\]\n\Z)  # to lose
    | (?P<configuration>\{\n\ *"software":\ "route-detr",\n\ *"detector":)
    | (?P<JSON>\{\n\ *"software":\ "route-detr")
    | (?P<report><!--\ route-detr\ -->)
    | (?P<metrics>\{"kind":\ ")
    | (?P<predictions>\[\n\ \{\n\ \ "image_id":\ .*\n\ \ "file_name":\ .*\n\ \ "category_id":\ .*\n\ \ "category_name":)
    | (?P<checkpoint>PK(?s:.*)route_detr\.checkpoint)
    | (?P<model>\x08(?s:.)\x12\x0aroute-detr)  # ONNX: its version, then its producer""",
    re.VERBOSE,
)


def kind_of(path: str | Path) -> str | None:
    """The kind of a file that this program wrote, told by what is in it; None for others' files.

    "picture", "configuration" (of a run), "JSON" (what else a command found), "report" (of a comparison), "metrics",
    "predictions", "checkpoint", "model" (exported), or "nothing" where nothing is in it.
    """
    with suppress(OSError, SyntaxError, ValueError, zipfile.BadZipFile):
        with open(path, "rb") as stream:
            head = stream.read(8192)
        if head.startswith(b"\x89PNG"):
            from PIL import Image  # here: `route-detr --help` need not wait for it

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


def save_figure(figure: Figure, path: str | Path) -> None:
    """A figure of matplotlib as a PNG that says who wrote it."""
    metadata = {"Software": SOFTWARE}
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=130, metadata=metadata))


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
