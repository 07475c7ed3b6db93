"""Wall time of several contenders, taken in turns so that a disturbance of the machine hits them alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

SHORTEST_SAMPLE = 0.01  # seconds; quicker calls are repeated within a sample
FEWEST_ROUNDS, MOST_ROUNDS = 5, 40


def _seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    seconds_per_call: Callable[[Callable[[], object], int], float] = _seconds_per_call,
) -> dict[str, list[float]]:
    """Seconds a call of each contender, one sample a round; the order rotates and turns around from round to round, so
    that nobody always follows the one that leaves the caches cold.

    Rounds go on for about `seconds`, within `FEWEST_ROUNDS` and `MOST_ROUNDS`; before them each runs twice unmeasured.
    `seconds_per_call(call, repeats)` takes a sample: by the wall clock, or as `gpu_timing` does.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / seconds_per_call(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    started = perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and perf_counter() - started > seconds:
            break
        turns = order[done % len(order) :] + order[: done % len(order)]
        for name in turns if done % 2 == 0 else reversed(turns):
            samples[name].append(seconds_per_call(calls[name], repeats[name]))
    return samples


def spread(samples: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Spread of our time over theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])
