"""What a data set's checks found: problems grouped by kind, counted, with the first examples of each."""

from __future__ import annotations

EXAMPLES_SHOWN = 3


class DatasetError(ValueError):
    """The data cannot be used as it is; the message names the file, the entry, and what was expected."""


class DatasetWarning(UserWarning):
    """The data was usable after a correction, which the message counts."""


class Report:
    """Counts of each kind of problem, and the first ``EXAMPLES_SHOWN`` examples of it.

    ``report.counts`` maps a kind to how often it was found. A report is true when it has anything in it.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES_SHOWN:
            shown.append(example)

    def lines(self) -> list[str]:
        """One line a kind: ``kind: count (first: example; example; example)``."""
        return [
            f"{kind}: {count} ({'first: ' if count > EXAMPLES_SHOWN else ''}{'; '.join(self.examples[kind])})"
            for kind, count in self.counts.items()
        ]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return "\n".join(self.lines())
