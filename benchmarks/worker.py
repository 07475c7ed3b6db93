"""A training step in a process of its own, taken when it is asked for: so that its peak memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import IO, Any

import torch

from .device import ROOT
from .memory import peak_bytes, resident_bytes
from .timing import spread, time_in_turns


class Worker:
    """The process of one contender: `python -m benchmarks COMMAND`, its choices and the number of threads as JSON."""

    def __init__(self, command: str, choices: Mapping[str, Any]) -> None:
        described = json.dumps({**choices, "threads": torch.get_num_threads()})
        words = [sys.executable, "-m", "benchmarks", command, described]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

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


def steps_in_turns(
    command: str,
    choices: Mapping[str, Mapping[str, Any]],
    disagreement: Callable[[dict[str, dict[str, Any]]], str | None],
    seconds: float,
) -> tuple[str | None, dict[str, list[float]], dict[str, dict[str, Any]]]:
    """A worker for each contender's choices, whose steps are taken in turns once the first ones agree.

    Returns:
        The answer of `disagreement` to the first steps (then the rest is empty); the seconds of each step; and their
        spread in milliseconds, the rounds and the memory before the first step and at the peak.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(command, each)) for name, each in choices.items()}
        first = {name: worker.answer() for name, worker in workers.items()}
        wrong = disagreement(first)
        if wrong is not None:
            return wrong, {}, {}
        steps = {name: partial(worker.ask, "step") for name, worker in workers.items()}
        samples = time_in_turns(steps, seconds, lambda step, _: step()["seconds"])
        found = {
            name: {
                "milliseconds": {part: round(value * 1e3, 2) for part, value in spread(samples[name]).items()},
                "rounds": len(samples[name]),
                "before_bytes": first[name]["before_bytes"],
                **worker.ask("peak"),
            }
            for name, worker in workers.items()
        }
    return None, samples, found


def serve(step: Callable[[], dict[str, Any]], answers: IO[str]) -> None:
    """The loop of a `Worker`'s process: it answers, a line of JSON each.

    First with a step and what was resident before it; then each line `step` on the standard input with another step,
    and `peak` with the greatest resident size.
    """
    before = resident_bytes()
    print(json.dumps({**step(), "before_bytes": before}), file=answers, flush=True)
    for line in sys.stdin:
        answer = step() if line.strip() == "step" else {"peak_bytes": peak_bytes()}
        print(json.dumps(answer), file=answers, flush=True)
