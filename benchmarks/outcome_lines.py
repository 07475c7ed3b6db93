"""A pytest plugin, `-p benchmarks.outcome_lines`: every outcome as a line of JSON as it comes."""

from __future__ import annotations

import json

import pytest

LONGEST_REASON = 2000


class Outcomes:
    """Writes through pytest's own terminal, which no test's capture swallows."""

    def __init__(self, config: pytest.Config) -> None:
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row = {"kind": "test", "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped and isinstance(report.longrepr, tuple):
            row["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            row["reason"] = report.longreprtext[-LONGEST_REASON:]
        terminal = self.plugins.get_plugin("terminalreporter")  # made after the plugins of the command line
        terminal.write(f"\n{json.dumps(row)}\n", flush=True)  # after the letter of the outcome


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the process that has the terminal
        config.pluginmanager.register(Outcomes(config))
