"""Somebody else's codebase on our ops: what an `apply()` replaces, what it leaves and why; and the way back.

Deformable attention modules of other codebases keep the four linear layers of Deformable DETR (sampling_offsets,
attention_weights, value_proj, output_proj), so that the fused op can take what the first three give. Where no kernel of
ours runs a call (a device without one, a graph that is being exported) and no backend was asked for, a replacement
calls the original.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod, wraps
from importlib import import_module
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import nn

from .. import backends
from ..ops.levels import SpatialShapes
from ..ops.ms_deform_attn_fused import ms_deform_attn_fused

PLAIN, FUSED = "ms_deform_attn", "ms_deform_attn_fused"
ALREADY_REPLACED = "already replaced by an earlier apply()"
REPLACED_BY_OTHERS = "other code has replaced its forward: apply() first, that code afterwards"
UNKNOWN_DECORATOR = "it is decorated in a way that a replacement cannot keep (no functools.wraps around one function)"

_MISSING = object()
_active: list[Report] = []
_bound: WeakSet = WeakSet()
"""The functions that were bound to single modules: copies of a model have them, too."""


@dataclass(frozen=True)
class Replaced:
    """`name` of the codebase or model now runs on `op` (and in brackets, how)."""

    name: str
    op: str


@dataclass(frozen=True)
class Left:
    """`name` runs its original code, because of `reason`."""

    name: str
    reason: str


class _Saved:
    """An attribute as it was. A module is held weakly, with what is bound to it: replacing keeps no model alive."""

    def __init__(self, owner: Any, attribute: str, original: Any, replacement: Any):
        self.owner = ref(owner) if isinstance(owner, nn.Module) else lambda: owner
        self.attribute = attribute
        self._original = _unbound(original, owner)  # _MISSING where the owner had none, but used its class's
        self._original_is_bound = self._original is not original
        self._replacement = _unbound(replacement, owner)

    def covers(self, owner: Any, attribute: str) -> bool:
        """Whether this is `owner.attribute`, or that of its class."""
        mine = self.owner()
        of_its_class = isinstance(mine, type) and isinstance(owner, mine)
        return self.attribute == attribute and (mine is owner or of_its_class)

    def overwritten(self) -> bool:
        """Whether other code has replaced the replacement."""
        owner = self.owner()
        return owner is not None and _unbound(_names(owner).get(self.attribute), owner) is not self._replacement

    def restore(self) -> None:
        owner = self.owner()
        if owner is not None:
            original = MethodType(self._original, owner) if self._original_is_bound else self._original
            _set(owner, self.attribute, original)


class Report:
    """The result of an `apply()`: a list of what runs on our ops now, and of what does not and why.

    `print(report)` shows it, `report.revert()` puts the originals back, and as a context manager it reverts at the end
    of its block.

    Attributes:
        codebase: the integration's name.
        replaced: a list of `Replaced`.
        left: a list of `Left`.
    """

    def __init__(self, codebase: str):
        self.codebase = codebase
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self._saved: list[_Saved] = []

    def replace(self, owner: Any, attribute: str, replacement: Any, *, name: str, op: str) -> None:
        """Set `owner.attribute` to `replacement`, remembering the original; what is ours already is left.

        In a dictionary (`sys.modules`) it is the item. A replacement of None (`inside_decorators` found no way) leaves
        the original, too.
        """
        if replacement is None:
            self.leave(name, UNKNOWN_DECORATOR)
            return
        original = _names(owner).get(attribute, _MISSING)
        if is_replaced(owner, attribute) or _function_of(original) in _bound:
            self.leave(name, ALREADY_REPLACED)
            return
        _set(owner, attribute, replacement)
        if isinstance(replacement, MethodType):
            _bound.add(replacement.__func__)
        self._saved.append(_Saved(owner, attribute, original, replacement))
        self.replaced.append(Replaced(name, op))

    def replace_forward(
        self, owner: nn.Module | type[nn.Module], replacement: Callable[[Callable], Callable], *, name: str, op: str
    ) -> None:
        """Set the forward of a module, or of a class, to `replacement(original)` inside the original's decorators.

        A module whose forward other code has replaced is left.
        """
        if isinstance(owner, type):
            self.replace(owner, "forward", inside_decorators(owner.forward, replacement), name=name, op=op)
        elif replaced_by_others(owner):
            self.leave(name, REPLACED_BY_OTHERS)
        else:
            forward = inside_decorators(type(owner).forward, replacement)
            self.replace(owner, "forward", forward and MethodType(forward, owner), name=name, op=op)

    def leave(self, name: str, reason: str) -> None:
        """Note that `name` stays as it is."""
        self.left.append(Left(name, reason))

    def names(self) -> Iterator[tuple[Replaced, Any, str]]:
        """The replaced parts, each with its owner (module, class, Python module or dictionary) and attribute."""
        for entry, saved in zip(self.replaced, self._saved, strict=False):
            owner = saved.owner()
            if owner is not None:
                yield entry, owner, saved.attribute

    def revert(self) -> None:
        """Put every original back, the last one first; a second call does nothing.

        Raises:
            RuntimeError: someone else has replaced one of the names since; nothing is changed then.
        """
        for saved in self._saved:
            if saved.overwritten():
                raise RuntimeError(
                    f"{self.codebase}: revert: {saved.attribute} of {_described(saved.owner())} has been replaced by "
                    "other code since apply(); undo that first"
                )
        for saved in reversed(self._saved):
            saved.restore()
        self._saved.clear()
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"route-kernels: {self.codebase}: {len(self.replaced)} replaced, {len(self.left)} left"
        width = max((len(entry.name) for entry in (*self.replaced, *self.left)), default=0)
        for entry in self.replaced:
            yield f"  {entry.name:{width}}  -> {entry.op}"
        for entry in self.left:
            yield f"  {entry.name:{width}}  left: {entry.reason}"


def inside_decorators(decorated: Callable, replacement: Callable[[Callable], Callable]) -> Callable | None:
    """`replacement(function)` inside the decorators (casts, autocast, no_grad, ...) that `decorated` has around it.

    A decorator that follows `functools.wraps` returns a function that holds in its closure what it wraps: a copy of
    that function holds the replacement instead.

    Returns:
        None where there is a decorator of another making, which would be lost.
    """
    if isinstance(decorated, partial | partialmethod):
        return None
    inner = getattr(decorated, "__wrapped__", None)
    if inner is None:
        return replacement(decorated)
    cells = getattr(decorated, "__closure__", None) or ()
    held = [_content(cell) is inner for cell in cells]
    ours = inside_decorators(inner, replacement) if any(held) else None
    if ours is None:
        return None
    ours.__signature__ = inspect.signature(inner)  # decorators like force_fp32 look up the arguments' names
    closure = tuple(CellType(ours) if holds else cell for cell, holds in zip(cells, held, strict=True))
    copy = FunctionType(decorated.__code__, decorated.__globals__, decorated.__name__, decorated.__defaults__, closure)
    copy.__kwdefaults__ = decorated.__kwdefaults__
    copy.__dict__.update({name: ours if value is inner else value for name, value in vars(decorated).items()})
    return copy


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return _MISSING


def is_replaced(owner: Any, attribute: str) -> bool:
    """Whether an `apply()` that has not been reverted replaced `owner.attribute`, or that of its class."""
    return any(saved.covers(owner, attribute) for report in _active for saved in report._saved)


def replaced_by_others(module: nn.Module) -> bool:
    """Whether this very module has a forward that is neither its class's nor an `apply()`'s."""
    function = _function_of(vars(module).get("forward"))
    return function is not None and function is not type(module).forward and function not in _bound


@contextmanager
def applying(codebase: str, *, verbose: bool) -> Iterator[Report]:
    """A report to fill in; on an error everything replaced so far is put back, on success it is active and printed."""
    report = Report(codebase)
    _active.append(report)
    try:
        yield report
    except BaseException:
        report.revert()
        raise
    if verbose:
        print(report)


def revert_all(codebase: str) -> None:
    """Revert every active report of a codebase, the latest first."""
    for report in [report for report in reversed(_active) if report.codebase == codebase]:
        report.revert()


def _function_of(value: Any) -> Any:
    return getattr(value, "__func__", value)


def _unbound(value: Any, owner: Any) -> Any:
    """The function of a method that is bound to `owner`; every other value as it is."""
    return value.__func__ if isinstance(value, MethodType) and value.__self__ is owner else value


def _names(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, dict) else vars(owner)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        if value is _MISSING:
            del owner[name]
        else:
            owner[name] = value
    elif value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _described(owner: Any) -> str:
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__


# ---- deformable attention ------------------------------------------------------------------------------------------


def has_kernel(op: str, tensor: torch.Tensor) -> bool:
    """Whether a kernel of ours runs `op` on tensors like this one, or a backend was asked for; else the original is
    the better one: as fast, and exported graphs look as they always did."""
    if backends.requested_backend() is not None:
        return True
    return not backends.exporting() and backends.resolve(op, None, tensor) != "reference"


def sample(
    module: nn.Module,
    query: torch.Tensor,  # [B, N, C]
    reference_points: torch.Tensor,  # [B, N, L or 1, 2 or 4]
    memory: torch.Tensor,  # [B, S, C]
    spatial_shapes: SpatialShapes,
    padding_mask: torch.Tensor | None,  # [B, S] bool, True = padding
    *,
    heads: int,
) -> torch.Tensor:
    """The fused op between a module's linear layers, output_proj included: [B, N, C]."""
    value = module.value_proj(memory).unflatten(-1, (heads, -1))
    offsets = module.sampling_offsets(query).unflatten(-1, (heads, -1, 2))
    logits = module.attention_weights(query).unflatten(-1, (heads, -1))
    sampled = ms_deform_attn_fused(value, spatial_shapes, reference_points, offsets, logits, value_mask=padding_mask)
    return module.output_proj(sampled)


def replace_function(report: Report, function: Callable, plain: Callable) -> None:
    """Every name that a loaded module binds to `function`, a core in PyTorch; importers by value included."""
    replacement = plain_or_original(partial(outside_autocast, plain), function)
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and vars(module).get(function.__name__) is function:
            report.replace(module, function.__name__, replacement, name=f"{name}.{function.__name__}", op=PLAIN)


def forward_or_original(fused: Callable[..., torch.Tensor]) -> Callable[[Callable], Callable]:
    """original -> a module's forward: `fused` where a kernel runs it."""

    def replacement(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(original)
        def forward(self: nn.Module, query: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            return (fused if has_kernel(FUSED, query) else original)(self, query, *arguments, **keywords)

        return forward

    return replacement


def outside_autocast(plain: Callable[..., torch.Tensor], value: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
    """The plain form under autocast as `grid_sample` and with it every core in PyTorch is there: in float32."""
    device = value.device.type
    if not torch.is_autocast_enabled(device):
        return plain(value, *arguments, **keywords)
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    with torch.autocast(device, enabled=False):
        return plain(value, *arguments, **keywords)


def plain_or_original(plain: Callable[..., torch.Tensor], original: Callable[..., torch.Tensor]) -> Callable | None:
    """A function of value and more: `plain` where a kernel runs it. See `inside_decorators` for those of `original`."""

    def replacement(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(original)
        def function(value: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            return (plain if has_kernel(PLAIN, value) else original)(value, *arguments, **keywords)

        return function

    return inside_decorators(original, replacement)


@dataclass(frozen=True)
class Package:
    """An installed package with an attention class that is replaced as a whole, or in one model.

    Attributes:
        name: of the package, for reports.
        module: where the class and the functions are.
        install: what to install where `module` cannot be imported.
        attention: the name of the class.
        forward: its forward by the fused op.
        functions: plain forms of its functions, under their names.
        extension: what it compiles.
        provide: report -> None, before the package is imported.
        replace_more: (report, the imported module) -> None, where the whole package is replaced.
    """

    name: str
    module: str
    install: str
    attention: str
    forward: Callable[..., torch.Tensor]
    functions: Sequence[Callable[..., torch.Tensor]]
    extension: str = ""
    provide: Callable[[Report], None] = lambda report: None
    replace_more: Callable[[Report, ModuleType], None] = lambda report, bindings: None

    def apply(self, model_or_family: nn.Module | None = None, *, verbose: bool = True) -> Report:
        """Run deformable attention of the package on our ops.

        Args:
            model_or_family: a model, of which only the modules of its attention class change; None for the package:
                every such module, and the functions that compute the same.
            verbose: print the report.

        Returns:
            The report of what was replaced, what was left and why; it reverts, also as a context manager.

        Raises:
            ImportError: the package is not installed, or was imported before without its extension.
            TypeError: not a model.
            ValueError: a model without such a module.
        """
        with applying(self.name, verbose=verbose) as report:
            self.provide(report)
            try:
                bindings = import_module(self.module)
            except ImportError as error:
                raise ImportError(
                    f"{self.name}.apply: {self.module} cannot be imported ({error}); install {self.install}"
                ) from error
            attention = getattr(bindings, self.attention)
            if not issubclass(attention, nn.Module):  # a class that only raises stands in for it
                raise ImportError(
                    f"{self.name}.apply: {self.name} has been imported without its extension {self.extension}, so it "
                    f"has no attention module; call apply() before the first import of {self.name}"
                )
            if model_or_family is not None:
                self._replace_in_model(report, attention, model_or_family)
                return report
            name = f"{attention.__module__}.{attention.__qualname__}"
            report.replace_forward(attention, forward_or_original(self.forward), name=name, op=FUSED)
            self.replace_more(report, bindings)
            for plain in self.functions:
                replace_function(report, getattr(bindings, plain.__name__), plain)
        return report

    def _replace_in_model(self, report: Report, attention: type[nn.Module], model: nn.Module) -> None:
        expected = f"{self.name}.apply: model_or_family: expected a"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{expected} torch.nn.Module or None, got {type(model).__name__}")
        modules = {name: module for name, module in model.named_modules() if isinstance(module, attention)}
        if not modules:
            raise ValueError(
                f"{expected} model with {attention.__name__} modules, got {type(model).__name__}, which has none"
            )
        for name, module in modules.items():
            name = name or type(module).__name__
            if type(module).forward is not attention.forward:
                report.leave(name, f"{type(module).__name__} has a forward of its own")
            else:
                report.replace_forward(module, forward_or_original(self.forward), name=name, op=FUSED)

    def revert(self) -> None:
        """Put back everything that `apply` has replaced."""
        revert_all(self.name)
