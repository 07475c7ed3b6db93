"""The user's function, and the model and inputs that it makes."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = tuple | Mapping[str, Any]


class UsageError(Exception):
    """What was given does not work; the message is one line that names what was expected."""


@contextmanager
def users_code(doing: str) -> Iterator[None]:
    """Whatever the user's code raises inside: its traceback, and one line that says what was being done.

    Raises:
        UsageError: it raised.
    """
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"{doing} raised {type(error).__name__} (traceback above)") from error


def load(target: str) -> Callable[[], Any]:
    """The function of "module:function" (installed, or in the current folder) or "path/file.py:function".

    Raises:
        UsageError: there is no such module, file or function, or importing it raises.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise UsageError(f"TARGET: expected your.module:function or file.py:function, got {target!r}")
    module = _load_file(Path(place)) if place.endswith(".py") else _import_module(place)
    try:
        function = getattr(module, name)
    except AttributeError:
        raise UsageError(f"{target}: expected a function that builds a model, but {place} has no {name}") from None
    if not callable(function):
        raise UsageError(f"{target}: expected a function that builds a model, got {type(function).__name__}")
    return function


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path}: expected a Python file, found none")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with users_code(f"importing {path}"):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    with users_code(f"importing {name}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            missing = error.name
    raise UsageError(f"{name}: expected a module, but there is no {missing} in {os.getcwd()} or installed")


def build(function: Callable[[], Any], target: str) -> tuple[nn.Module, Inputs | None]:
    """The model, and its example inputs if the function gives some: as a tuple, a mapping, or a function of neither.

    Raises:
        UsageError: it raises, or returns something else.
    """
    with users_code(f"{target}()"):
        built = function()
        model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
        if callable(inputs):
            inputs = inputs()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{target}: expected it to return a torch.nn.Module or (module, inputs), got {type(built).__name__}"
        )
    if isinstance(inputs, torch.Tensor | list):
        inputs = (inputs,)
    if inputs is not None and not isinstance(inputs, tuple | Mapping):
        raise UsageError(
            f"{target}: inputs: expected a tuple or mapping of arguments, or a function that returns one, "
            f"got {type(inputs).__name__}"
        )
    return model, inputs
