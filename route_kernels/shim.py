"""Runs a script that needs the compiled `MultiScaleDeformableAttention`, or `mmcv._ext`, with our operators instead.

    python -m route_kernels.shim main.py --batch_size 2 ...
    python -m route_kernels.shim -m package.module ...
    torchrun --nproc_per_node 2 -m route_kernels.shim main.py ...

The script sees what it would see under plain `python`: its own `sys.argv`, `sys.path[0]`, `__name__` and `__file__`.
Worker processes that start afresh (data loaders under spawn or forkserver) find `MultiScaleDeformableAttention`, too.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

USAGE = "usage: python -m route_kernels.shim (SCRIPT.py | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> int | None:
    """Provide the extension, then run `SCRIPT.py ARGUMENT ...` or `-m MODULE ARGUMENT ...` as the main program.

    Returns:
        2 for wrong usage, with the reason on stderr; what the program exits with is raised by it as SystemExit.
    """
    if not arguments:
        return _refuse("expected a script or -m MODULE")
    if arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}")
        return None
    if arguments[0] == "-m":
        return _run_module(arguments[1:])
    if arguments[0].startswith("-"):
        return _refuse(f"unknown option {arguments[0]}; options of the script come after its name")
    return _run_script(arguments)


def _run_script(arguments: list[str]) -> int | None:
    script = arguments[0]
    if not os.path.isfile(script):
        return _refuse(f"{script} is not a file")
    if not _safe_path():
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    _provide_extension()
    sys.argv[:] = arguments
    runpy.run_path(script, run_name="__main__")
    return None


def _run_module(arguments: list[str]) -> int | None:
    if not arguments:
        return _refuse("-m: expected the name of a module")
    module = arguments[0]
    _provide_extension()
    if not _exists(module):
        return _refuse(f"-m: no module named {module}")
    sys.argv[:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return None


def _exists(module: str) -> bool:
    """Whether it can be found; looking for it imports its parent packages."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
            raise  # a parent is there, and something that it imports is not
        return False


def _safe_path() -> bool:
    """Whether Python was told (-P, PYTHONSAFEPATH) to put no folder of the program at the front of sys.path."""
    return getattr(sys.flags, "safe_path", False)


def _provide_extension() -> None:
    from .integrations import deformable_detr, importable, mmcv

    folder = str(Path(importable.__file__).parent)
    sys.path.insert(0 if _safe_path() else 1, folder)  # handed to spawned processes, unlike sys.modules
    deformable_detr.apply(verbose=False)
    mmcv.provide_extension(verbose=False)


def _refuse(reason: str) -> int:
    print(f"route_kernels.shim: {reason}\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
