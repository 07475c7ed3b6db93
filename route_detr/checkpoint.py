"""Checkpoints: written whole or not at all, read without running any code that they contain.

A checkpoint is one dictionary of tensors and plain containers, so ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from route_detr.errors import CheckpointError

FORMAT = "route_detr.checkpoint"
VERSION = 2
REQUIRED = ("config", "categories", "model")


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(stream)`` on a temporary file in the folder of ``path``, then put it in place in one step.

    A process killed at any moment leaves the old file or the new one under ``path``, never a part of either.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself reaches the disk
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, tuples and dicts only) to ``path``, whole or not at all."""
    complete = {"format": FORMAT, "version": VERSION, **state}
    write_atomically(path, lambda stream: torch.save(complete, stream))


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is not a checkpoint of this program.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler or the zip reader
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint; it is damaged or holds more than tensors ({reason[:160]})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint written by route-detr")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: checkpoint format {state.get('version')}, this program reads format {VERSION}")
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise CheckpointError(f"{path}: incomplete checkpoint, without {', '.join(missing)}")
    return state


def random_state() -> dict[str, Any]:
    """The states of PyTorch's random number generators, as tensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a ``random_state()``; CUDA states apply where as many devices are visible."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
