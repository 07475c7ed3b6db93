"""The cache file of `route-kernels tune`: settings measured on a GPU, which go before those of the table.

`$ROUTE_KERNELS_TUNED` names the file; else it is `route-kernels/tuned-<GPU>.json` in the user's cache directory
(`$XDG_CACHE_HOME` or `~/.cache`). A file of another version, Triton or architecture is left alone, with a warning.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
VARIABLE = "ROUTE_KERNELS_TUNED"

Rows = dict[str, dict[str, int]]  # {key: settings}


def bucket(size: int) -> int:
    """The power of two at or above: shapes of one bucket share their settings."""
    return 1 << max(size - 1, 0).bit_length()


def key(kernel_name: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """ "routed_attention_forward bfloat16 D=32 N=2048": sizes in buckets."""
    named = [f"{name}={bucket(size)}" for name, size in sorted(sizes.items())]
    return " ".join([kernel_name, str(dtype).removeprefix("torch."), *named])


def path(device: torch.device) -> Path:
    """Where the settings of this GPU are kept."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache / "route-kernels" / f"tuned-{name}.json"


def circumstances(device: torch.device) -> dict[str, Any]:
    """What must be the same for settings to be used again."""
    import triton

    from .. import __version__

    return {
        "format": FORMAT,
        "route-kernels": __version__,
        "triton": triton.__version__,
        "gpu": torch.cuda.get_device_name(device),
    }


def settings(
    kernel_name: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]
) -> dict[str, int] | None:
    """The tuned settings of a launch on this GPU, or None."""
    rows = _rows_of(device)
    return rows.get(key(kernel_name, dtype, sizes)) if rows else None


@functools.cache
def _rows_of(device: torch.device) -> Rows:
    file = path(device)
    return read(file, circumstances(device)) if file.exists() else {}


def read(file: Path, expected: Mapping[str, Any]) -> Rows:
    """The rows of a cache file; none, with a warning, where it is not of these circumstances or cannot be read."""
    again = "run `route-kernels tune` again or delete it"
    try:
        content = json.loads(file.read_text())
        found, rows = content["circumstances"], content["rows"]
        differences = [f"{name} {found.get(name)}, now {value}" for name, value in expected.items()
                       if found.get(name) != value]  # fmt: skip
        valid = all(isinstance(value, int) for row in rows.values() for value in row.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{file}: cannot be read ({error!r}) and is ignored; {again}", stacklevel=2)
        return {}
    if differences or not valid:
        reason = "; ".join(differences) or "settings that are no integers"
        warnings.warn(f"{file}: ignored: {reason}; {again}", stacklevel=2)
        return {}
    return rows


def write(file: Path, circumstances: Mapping[str, Any], rows: Rows) -> None:
    """Writes the whole file or, interrupted, nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump({"circumstances": circumstances, "rows": rows}, stream, indent=1)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
