"""Outputs and gradients of one training step with the model's own code and with ours."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from ..integrations.codebase import Report
from ..integrations.convention import autocast_difference
from .fitting import Apply, applied, noted_use
from .target import Inputs, moved, users_code
from .training_step import Step, counted_calls, perturb_sampling, relative_errors, tensors_in, training_step

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest relative error of steps that agree, in the dtype in which they are compared.

float64 leaves room for models with float32 parts inside; a location that is half a pixel off shows at 1e-3 and more.
"""

ROUNDINGS = 10
"""In float32, a result that moves by a tenth of what is allowed when weights are rounded otherwise is not judged."""

AGREE, DIFFER, UNANSWERED = 0, 1, 2
"""Exit codes; unanswered are also a usage error, and a model in which nothing of ours ran."""


@dataclass(frozen=True)
class Agreement:
    """Relative errors of a step's results ("output NAME", "grad PARAMETER"), beside those of the original itself.

    Attributes:
        dtype: in which the steps ran.
        perturbed: how many parameters of sampling layers got noise, so that a wrong op shows.
        errors: of every result that can be judged, the largest first.
        lost: the results that cannot, since rounding alone moves them by as much as is allowed.
        noise: the largest error between two steps of the original model.
        calls, calls_before: of our ops, in our step and in the original's.
        reports: what of the replaced and left names the model contains or calls.
        autocast: by replaced module, why it is not as the original under autocast, or None; empty where the original
            does not run so.
        failure: what our step raised, if it did.
    """

    dtype: torch.dtype
    perturbed: int
    errors: dict[str, float]
    lost: list[str]
    noise: float
    calls: Counter[str]
    calls_before: Counter[str]
    failure: str | None
    reports: list[Report]
    autocast: dict[str, str | None]

    @property
    def allowed(self) -> float:
        return TOLERANCES[self.dtype]

    @property
    def code(self) -> int:
        """AGREE, DIFFER, or UNANSWERED where the original does not agree with itself."""
        if self.failure is not None:
            return DIFFER
        if not self.noise <= self.allowed or not self.errors:
            return UNANSWERED
        agrees = all(error <= self.allowed for error in self.errors.values()) and not any(self.autocast.values())
        return AGREE if agrees else DIFFER

    def errors_of(self, kind: str) -> dict[str, float]:
        """Those of "output" or of "grad", by name."""
        return {name.removeprefix(f"{kind} "): error for name, error in self.errors.items() if name.startswith(kind)}


def compare(model: nn.Module, inputs: Inputs, appliers: list[Apply], seed: int) -> Agreement:
    """Both steps in float64, or in float32 where the model has parts that cannot run in float64.

    Raises:
        UsageError: the step of the model as it is raised.
    """
    with users_code("a training step of the model as it is"):
        dtype = torch.float64 if _runs_in(torch.float64, model, inputs, seed) else torch.float32
    failure, ours = None, {}
    with borrowed(model, dtype):
        perturbed = perturb_sampling(model, seed=seed)
        with users_code("a training step of the model as it is"):
            with counted_calls() as calls_before:
                original = _step(model, inputs, dtype, seed)
            again = _step(model, inputs, dtype, seed)
            rounded = original if dtype == torch.float64 else _step_of_rounded_weights(model, inputs, dtype, seed)
        with applied(appliers) as reports, counted_calls() as calls, noted_use(reports) as used:
            try:
                ours = _step(model, inputs, dtype, seed)
            except Exception as error:
                traceback.print_exc()
                failure = f"{type(error).__name__}: {error}"
    names = {name or type(module).__name__ for name, module in model.named_modules()}
    for report in reports:
        report.replaced = [entry for entry in report.replaced if entry in used]
        report.left = [entry for entry in report.left if entry.name in names]
    errors = relative_errors(ours, original)
    lost = [name for name, error in relative_errors(rounded, original).items() if ROUNDINGS * error > TOLERANCES[dtype]]
    worst_first = sorted(errors.keys() - lost, key=lambda name: errors[name], reverse=True)
    return Agreement(
        dtype=dtype,
        perturbed=perturbed,
        errors={name: errors[name] for name in worst_first},
        lost=lost,
        noise=max(relative_errors(again, original).values()),
        calls=calls,
        calls_before=calls_before,
        failure=failure,
        reports=[report for report in reports if report.replaced],
        autocast={} if failure is not None else _autocast_differences(model, inputs, appliers, seed),
    )


def _autocast_differences(model: nn.Module, inputs: Inputs, appliers: list[Apply], seed: int) -> dict[str, str | None]:
    """Each replaced module beside the original, on what the model gives it under autocast, without dropout."""
    device = next(model.parameters()).device
    with borrowed(model, torch.float32), torch.no_grad():
        perturb_sampling(model, seed=seed)
        with applied(appliers) as reports:
            owners = [owner for report in reports for _, owner, _ in report.names()]
        modules = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if any(module is owner or (isinstance(owner, type) and isinstance(module, owner)) for owner in owners)
        }
        calls: dict[nn.Module, tuple] = {}
        hooks = [
            module.register_forward_pre_hook(lambda *call: calls.update({call[0]: call[1:]}), with_kwargs=True)
            for module in modules.values()
        ]
        run = partial(_output, device, torch.get_autocast_dtype(device.type))
        try:
            seed_everything(seed)
            moved_inputs = moved(inputs, device, torch.float32)
            run(model, (), moved_inputs) if isinstance(inputs, Mapping) else run(model, moved_inputs, {})
        except Exception:  # the original does not run under autocast: nobody uses it so
            return {}
        finally:
            for hook in hooks:
                hook.remove()
        called = {name: module for name, module in modules.items() if module in calls}
        with _evaluating(called.values()):
            exact = {
                name: _output(device, None, module, *moved(calls[module], device, torch.float32))
                for name, module in called.items()
            }
            theirs = {name: run(module, *calls[module]) for name, module in called.items()}
            with applied(appliers):
                return {
                    name: autocast_difference(
                        lambda name=name: theirs[name], lambda module=module: run(module, *calls[module]), exact[name]
                    )
                    for name, module in called.items()
                }


def _output(
    device: torch.device, dtype: torch.dtype | None, module: nn.Module, arguments: tuple, keywords: Mapping
) -> torch.Tensor:
    """The first tensor that a module returns, under autocast to `dtype` or without."""
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return next(tensor for _, tensor in tensors_in(module(*arguments, **keywords)))


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules and their parts in eval mode inside the block."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _runs_in(dtype: torch.dtype, model: nn.Module, inputs: Inputs, seed: int) -> bool:
    with borrowed(model, dtype):
        try:
            _step(model, inputs, dtype, seed)
        except (RuntimeError, TypeError):  # the model's own code mixes dtypes: what is said is in the float32 step
            return False
    return True


def _step(model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int) -> Step:
    seed_everything(seed)
    device = next(model.parameters()).device
    with _buffers_kept(model):
        return training_step(model, moved(inputs, device, dtype), seed=seed)


def _step_of_rounded_weights(model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int) -> Step:
    """A step whose weights are off by a rounding error: how far its results are off is what rounding does to them."""
    generator = torch.Generator().manual_seed(seed)
    with borrowed(model, dtype):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (torch.finfo(dtype).eps * noise).to(parameter) * parameter.data
        return _step(model, inputs, dtype, seed)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and PyTorch's generators: denoising queries and dropout come out the same."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def borrowed(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Copies of the weights in `dtype` inside the block; afterwards the model's own are back."""
    own = [(parameter, parameter.data) for parameter in model.parameters()]
    with _buffers_kept(model):
        for parameter, data in own:
            parameter.data = data.to(dtype if data.is_floating_point() else data.dtype, copy=True)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)
        try:
            yield
        finally:
            for parameter, data in own:
                parameter.data = data


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers (running statistics) that a step writes into."""
    own = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for buffers, name, buffer, values in own:
            buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(values)
