"""Example inputs for a transformers model, from its configuration, where the user gives none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .target import Inputs, UsageError

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
