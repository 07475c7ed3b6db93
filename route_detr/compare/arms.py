"""The arms of a comparison: configurations that differ from one another in a few fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from route_detr.config import Config, leaves
from route_detr.errors import UsageError

KNOWN: dict[str, dict[str, Any]] = {
    "plain": {"detector.route": False},
    "routed": {"detector.route": True},
    "nonnegative": {"detector.route": True, "detector.router_nonnegative": True},
    "frozen": {"detector.route": True, "detector.router_frozen": True},
    "all-layers": {"detector.route": True, "detector.routed_layers": "all"},
    "causal": {"detector.route": False, "detector.causal_from": 1},
}
"""Arms that a name alone stands for; docs/compare.md says what each can tell."""


class Arm(NamedTuple):
    """A name and what it changes in the configuration that all arms begin with."""

    name: str
    changes: dict[str, Any]  # dotted key -> value

    def config(self, base: Config, seed: int) -> Config:
        """ValueError names the arm, and a field that does not exist or fit."""
        try:
            return base.updated(self.changes | {"train.seed": seed})
        except ValueError as error:
            raise UsageError(f"--arm {self.name}: {error}") from error


def parsed_arms(given: Sequence[Sequence[str]] | None, file: Path | None) -> list[Arm]:
    """The arms of `--arm NAME [KEY=VALUE ...]` and of a YAML file {NAME: {section: {field: value}}}, in their order.

    Without either: plain and routed. A name alone is one of `KNOWN`, or else changes nothing.

    Raises UsageError for fewer than two arms, a name given twice, or one that is no name for a folder.
    """
    arms = []
    for name, *words in given or []:
        changes: dict[str, Any] = {} if words else dict(KNOWN.get(name, {}))
        for word in words:
            key, separator, value = word.partition("=")
            if not separator:
                raise UsageError(f"--arm {name} {word}: expected KEY=VALUE, as detector.route=false")
            changes[key] = yaml.safe_load(value)
        arms.append(Arm(name, changes))
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UsageError(f"{file}: {error}") from error
        if not isinstance(content, Mapping) or not all(isinstance(each, Mapping | None) for each in content.values()):
            raise UsageError(f"{file}: expected arms, NAME: {{section: {{field: value}}}}, got {content!r}")
        for name, values in content.items():
            arms.append(Arm(str(name), dict(KNOWN.get(name, {}) if values is None else leaves(values))))
    if not arms:
        arms = [Arm(name, KNOWN[name]) for name in ("plain", "routed")]
    names = [arm.name for arm in arms]
    if len(arms) < 2:
        raise UsageError(f"--arm: expected two or more, got {names[0]}")
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"--arm {name}: expected a name of letters, digits, '.', '_' and '-'")
        if names.count(name) > 1:
            raise UsageError(f"--arm {name}: given twice")
    return arms


def as_words(changes: Mapping[str, Any]) -> list[str]:
    """Changes as KEY=VALUE words of the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]
