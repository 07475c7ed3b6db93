"""Deformable attention modules of research code: the fused form for those that compute what the published one does.

Forks keep the names and change the formula (other box normalisers, modulation, another mask). So each module is first
compared with the fused form on a small example with random parameters: outputs and gradients in float64, and the output
under autocast, where casts show.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .. import backends
from .codebase import (
    FUSED,
    REPLACED_BY_OTHERS,
    UNKNOWN_DECORATOR,
    Report,
    forward_or_original,
    inside_decorators,
    replaced_by_others,
)

LINEAR_LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
EXAMPLE_LEVELS = ((4, 5), (3, 2), (2, 3), (1, 2))
BATCH, QUERIES = 2, 3
TOLERANCE = 1e-9
"""The most that float64 results differ by where only the order of their sums does."""

AUTOCAST_FACTOR, AUTOCAST_FLOOR = 4.0, 1e-5
"""Under autocast ours may err by so many times what theirs does, and by so much of the result's size: a lost cast of
float32 to bfloat16 shows as 1e4 times."""


@dataclass(frozen=True)
class Convention:
    """How a codebase spells the module: the fused forward, with its arguments, and the names of two attributes."""

    forward: Callable[..., torch.Tensor]
    heads: str
    levels: str

    def describes(self, module: nn.Module) -> bool:
        """Whether the module has the layers, the attributes and the arguments of forward of this convention."""
        return (
            all(isinstance(getattr(module, layer, None), nn.Linear) for layer in LINEAR_LAYERS)
            and all(isinstance(getattr(module, size, None), int) for size in (self.heads, self.levels))
            and arguments_of(type(module).forward) == arguments_of(self.forward)
        )


@torch.inference_mode(False)
@torch.enable_grad()
def fuse(report: Report, model: nn.Module, convention: Convention) -> None:
    """Give every module of `model` that follows the convention the fused forward; the others are left, with a reason.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{report.codebase}.apply: model: expected a torch.nn.Module or None, got {type(model).__name__}"
        )
    found = False
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "sampling_offsets", None), nn.Linear):
            continue
        found = True
        reason = _reason_to_leave(module, convention)
        if reason is None:
            report.replace_forward(
                module, forward_or_original(convention.forward), name=name or type(module).__name__, op=FUSED
            )
        else:
            report.leave(name or type(module).__name__, reason)
    if not found:
        report.leave(type(model).__name__, "no module in it has a linear layer `sampling_offsets`")


def arguments_of(function: Callable) -> list[str]:
    """The names of its parameters."""
    return list(inspect.signature(function).parameters)


def described(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def random_twin(module: nn.Module) -> nn.Module | str:
    """A float64 CPU copy of a module for a trial, its parameters random (as initialised, they hide a wrong formula).

    Returns:
        The copy, or why there can be none.
    """
    try:
        twin = copy.deepcopy(module).to("cpu", torch.float64).eval()
    except (NotImplementedError, RuntimeError) as error:  # on the meta device, sharded
        return f"could not be copied for a trial: {described(error)}"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return twin


def autocast_difference(
    theirs: Callable[[], torch.Tensor], ours: Callable[[], torch.Tensor], exact: torch.Tensor
) -> str | None:
    """The reason why, under autocast as it is on now, `ours()` does not stand for `theirs()`; None where it does.

    Args:
        exact: the same in float32 or float64, without autocast.
    """
    with torch.no_grad():
        with _switched_autocast() as by_theirs:
            expected = theirs()
        with _switched_autocast() as by_ours:
            found = ours()
    elsewhere = by_theirs - by_ours - {expected.device.type}
    if elsewhere:
        return f"it switches autocast of {', '.join(sorted(elsewhere))}: apply() once it is there, where it is compared"
    if found.dtype != expected.dtype:
        return f"under autocast it returns {expected.dtype}, the replacement {found.dtype}"
    error, allowed = (_rms(x.double() - exact.to(x.device).double()) for x in (found, expected))
    if not error <= AUTOCAST_FACTOR * allowed + AUTOCAST_FLOOR * _rms(exact):
        return f"under autocast it is off by {allowed:.1e}, the replacement by {error:.1e}"
    return None


@contextmanager
def _switched_autocast() -> Iterator[set[str]]:
    """The device types whose autocast is switched on or off inside the block."""
    devices: set[str] = set()
    enter = torch.autocast.__enter__

    def noting(self: torch.autocast) -> torch.autocast:
        devices.add(self.device)
        return enter(self)

    torch.autocast.__enter__ = noting
    try:
        yield devices
    finally:
        torch.autocast.__enter__ = enter


def _rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _reason_to_leave(module: nn.Module, convention: Convention) -> str | None:
    if replaced_by_others(module):
        return REPLACED_BY_OTHERS
    if not convention.describes(module):
        return f"{type(module).__name__} is not the published module: expected {', '.join(LINEAR_LAYERS)}, " + (
            f"{convention.heads}, {convention.levels} and forward({', '.join(arguments_of(convention.forward))})"
        )
    forward = inside_decorators(type(module).forward, forward_or_original(convention.forward))
    return UNKNOWN_DECORATOR if forward is None else _difference(module, convention, forward)


def _difference(module: nn.Module, convention: Convention, forward: Callable[..., torch.Tensor]) -> str | None:
    """The reason, by examples, why the replacement `forward` is not what `module` computes; None where it is."""
    twin = random_twin(module)
    if isinstance(twin, str):
        return twin
    for coordinates in (2, 4):
        arguments, leaves = _example(getattr(twin, convention.levels), twin.value_proj.in_features, coordinates)
        with backends.backend("reference"):
            try:
                theirs = _results(type(module).forward(twin, *arguments), leaves)
            except Exception as error:  # whatever somebody's module raises is the reason that is reported
                return f"its own forward does not run on a small CPU example: {described(error)}"
            ours = _results(forward(twin, *arguments), leaves)
        if not all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in zip(ours, theirs, strict=True)):
            return f"it computes something else than the published module (reference points of {coordinates} numbers)"
    exact, device = theirs[0], next(module.parameters()).device
    twin.to(device, torch.float32)
    arguments = [x.to(device, torch.float32 if x.is_floating_point() else x.dtype) for x in arguments]
    with backends.backend("reference"), torch.autocast(device.type):
        try:
            type(module).forward(twin, *arguments)
        except Exception:  # under autocast nobody uses it
            return None
        return autocast_difference(
            lambda: type(module).forward(twin, *arguments), lambda: forward(twin, *arguments), exact
        )


def _example(levels: int, channels: int, coordinates: int) -> tuple[tuple, tuple[torch.Tensor, ...]]:
    """The positional arguments of a forward, and those of them that have gradients."""
    generator = torch.Generator().manual_seed(coordinates)
    sizes = [EXAMPLE_LEVELS[level % len(EXAMPLE_LEVELS)] for level in range(levels)]
    shapes = torch.tensor(sizes)
    areas = shapes.prod(1)
    positions = int(areas.sum())

    def random(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    query = random(BATCH, QUERIES, channels).sub(0.5).requires_grad_()
    reference_points = random(BATCH, QUERIES, levels, coordinates).requires_grad_()
    memory = random(BATCH, positions, channels).sub(0.5).requires_grad_()
    padding = random(BATCH, positions) < 0.2
    return (query, reference_points, memory, shapes, areas.cumsum(0) - areas, padding), (
        query,
        reference_points,
        memory,
    )


def _results(output: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of a fixed weighting of it."""
    weighting = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return output.detach(), *torch.autograd.grad(output, leaves, weighting, materialize_grads=True)
