"""Figures that are counted, the same on every machine: their folder, and their sections of docs/counted.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .device import RESULTS, ROOT, circumstances
from .report import fill, markdown

COUNTED = RESULTS / "counted"
PAGE = ROOT / "docs" / "counted.md"


def section(name: str, results: Mapping[str, Any], parts: Sequence[str | tuple[Sequence[str], list[list[str]]]]) -> str:
    """A part of the page with its marks; what stands between them: sentences, and tables as (head, rows)."""
    path = (COUNTED / f"{name}.json").relative_to(ROOT)
    changed = " with changes" if results["dirty"] else ""
    versions = results["versions"]
    source = (
        f"[{name}.json](../{path.as_posix()}): commit {results['commit'][:12]}{changed}, PyTorch {versions['torch']}, "
        f"{results['date'][:10]}."
    )
    blocks = [part if isinstance(part, str) else markdown(*part) for part in parts]
    return "\n\n".join([f"<!-- {name}: begin -->\n{source}", *blocks]) + f"\n<!-- {name}: end -->"


def write(name: str, found: Mapping[str, Any], out: Path | None) -> dict[str, Any]:
    """`circumstances` and what was found as NAME.json in `out`, or in `COUNTED`; returns it."""
    results = {**circumstances(), **found}
    folder = out or COUNTED
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def read(name: str) -> dict[str, Any]:
    """The committed results."""
    return json.loads((COUNTED / f"{name}.json").read_text())


def fill_page(text: str) -> None:
    """Replaces a section of the page."""
    PAGE.write_text(fill(PAGE.read_text(), text))
