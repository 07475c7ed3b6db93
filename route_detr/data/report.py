"""Findings of a data set's checks: problems by kind, counted, with the first examples of each."""

from __future__ import annotations

EXAMPLES_SHOWN = 3


class DatasetError(ValueError):
    """The data cannot be used as it is; the message names the file, the entry, and what was expected."""


class DatasetWarning(UserWarning):
    """The data was usable after a correction, which the message counts."""


class Report(dict[str, list[str]]):
    """Examples of each kind of problem; as text one line a kind: ``kind: count (first: example; example; example)``."""

    def add(self, kind: str, example: str) -> None:
        self.setdefault(kind, []).append(example)

    def __str__(self) -> str:
        return "\n".join(
            f"{kind}: {len(found)} ({'first: ' if len(found) > EXAMPLES_SHOWN else ''}"
            f"{'; '.join(found[:EXAMPLES_SHOWN])})"
            for kind, found in self.items()
        )
