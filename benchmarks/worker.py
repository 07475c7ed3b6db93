"""A training step in a process of its own, taken when it is asked for: so that its peak memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch

from .device import ROOT
from .memory import peak_bytes, resident_bytes


class Worker:
    """The process of one contender: `python -m MODULE` with its choices, and the number of threads, as JSON."""

    def __init__(self, module: str, choices: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", module, json.dumps({**choices, "threads": torch.get_num_threads()})]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def answer(self) -> dict[str, Any]:
        """The next line that the process prints.

        Raises:
            RuntimeError: the process has ended; its message is on standard error.
        """
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a training step ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to `step` or `peak`, see `serve`."""
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.answer()


def serve(step: Callable[[], dict[str, Any]], answers: IO[str]) -> None:
    """What the process of a `Worker` does: it answers, a line of JSON each.

    First with a step and what was resident before it; then each line `step` on the standard input with another step,
    and `peak` with the greatest resident size.
    """
    before = resident_bytes()
    print(json.dumps({**step(), "before_bytes": before}), file=answers, flush=True)
    for line in sys.stdin:
        answer = step() if line.strip() == "step" else {"peak_bytes": peak_bytes()}
        print(json.dumps(answer), file=answers, flush=True)
