"""What an `apply()` replaced in a foreign codebase, what it left and why; and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_MISSING = object()
_active: list[Report] = []


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


@dataclass(frozen=True)
class _Saved:
    owner: Any
    attribute: str
    original: Any  # _MISSING where the owner itself had none (an instance that used its class's)
    replacement: Any

    def covers(self, owner: Any, attribute: str) -> bool:
        """Whether this is `owner.attribute`, or that of its class."""
        of_its_class = isinstance(self.owner, type) and isinstance(owner, self.owner)
        return self.attribute == attribute and (self.owner is owner or of_its_class)


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

        Of a dictionary (`sys.modules`) it is the item.
        """
        original = _names(owner).get(attribute, _MISSING)
        if is_replaced(owner, attribute):
            self.leave(name, "already replaced by an earlier apply()")
            return
        _set(owner, attribute, replacement)
        self._saved.append(_Saved(owner, attribute, original, replacement))
        self.replaced.append(Replaced(name, op))

    def leave(self, name: str, reason: str) -> None:
        """Note that `name` stays as it is."""
        self.left.append(Left(name, reason))

    def revert(self) -> None:
        """Put every original back, the last one first; a second call does nothing.

        Raises:
            RuntimeError: someone else has replaced one of the names since; nothing is changed then.
        """
        for saved in self._saved:
            if _names(saved.owner).get(saved.attribute) is not saved.replacement:
                raise RuntimeError(
                    f"{self.codebase}: revert: {saved.attribute} of {_described(saved.owner)} has been replaced by "
                    "other code since apply(); undo that first"
                )
        for saved in reversed(self._saved):
            _set(saved.owner, saved.attribute, saved.original)
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


def is_replaced(owner: Any, attribute: str) -> bool:
    """Whether an `apply()` that has not been reverted replaced `owner.attribute`, or that of its class."""
    return any(saved.covers(owner, attribute) for report in _active for saved in report._saved)


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
