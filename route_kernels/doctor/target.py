"""The user's function, the model and inputs that it makes, and example inputs where it makes none."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = tuple | Mapping[str, Any]


class UsageError(Exception):
    """The given target does not work; the message is one line that names what was expected."""


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


# ---- inputs ----------------------------------------------------------------------------------------------------------

BATCH = 2
IMAGE_SIZE = 640
"""Pixels a side where the configuration names none: what RT-DETR and its successors are trained at."""

BOXES = 3


def example_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, the most telling first: with labels, so that the step has a loss, then without.

    Raises:
        UsageError: the model is not one of transformers, or needs more than images.
    """
    config = getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters
    if config is None or not hasattr(model, "main_input_name") or "pixel_values" not in parameters:
        raise UsageError(
            f"{type(model).__name__}: expected (model, inputs), as only a transformers model of images gets its own"
        )
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in kinds and name != "pixel_values"
    ]
    if needed:
        raise UsageError(f"{type(model).__name__}: expected (model, inputs), as its forward needs {', '.join(needed)}")
    side = _image_size(config)
    images = {"pixel_values": torch.randn(BATCH, int(getattr(config, "num_channels", None) or 3), side, side)}
    if "labels" in parameters and find_spec("scipy") is not None:  # which matches boxes with queries
        yield images | {"labels": [_labels(config) for _ in range(BATCH)]}
    yield images


def _image_size(config: Any) -> int:
    for owner in (config, getattr(config, "backbone_config", None)):
        size = getattr(owner, "image_size", None)
        if isinstance(size, int):
            return size
        if isinstance(size, list | tuple) and size:
            return int(size[0])
    return IMAGE_SIZE


def _labels(config: Any) -> dict[str, torch.Tensor]:
    """Boxes as (cx, cy, w, h) between 0 and 1, inside the image."""
    sizes = 0.1 + 0.3 * torch.rand(BOXES, 2)
    centres = sizes / 2 + (1 - sizes) * torch.rand(BOXES, 2)
    return {
        "class_labels": torch.randint(0, getattr(config, "num_labels", 1), (BOXES,)),
        "boxes": torch.cat([centres, sizes], dim=1),
    }


def moved(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same structure with every tensor on `device`, the floating ones in `dtype`."""
    if isinstance(inputs, torch.Tensor):
        new = inputs.detach().to(device, dtype if inputs.is_floating_point() else inputs.dtype)
        return new.requires_grad_(inputs.requires_grad)
    if isinstance(inputs, Mapping):
        return {name: moved(item, device, dtype) for name, item in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(moved(item, device, dtype) for item in inputs))
    if isinstance(inputs, list | tuple):
        return type(inputs)(moved(item, device, dtype) for item in inputs)
    return inputs


def described(inputs: Inputs) -> str:
    """`pixel_values [2, 3, 640, 640], labels`: every argument, with its shape if it is a tensor."""
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return ", ".join(
        f"{name} {list(item.shape)}" if isinstance(item, torch.Tensor) else str(name) for name, item in items
    )
