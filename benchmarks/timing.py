"""Time of several contenders, taken in turns so that a disturbance of the machine hits them alike."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch

SHORTEST_SAMPLE = 0.01  # seconds; quicker calls are repeated within a sample
FEWEST_ROUNDS, MOST_ROUNDS = 5, 40
FLUSHED_BYTES = 512 * 2**20  # more than the L2 cache of any GPU so far
ROTATED_BYTES = 256 * 2**20  # twice the largest L2 cache: what was read comes back after it has been displaced
MOST_COPIES = 64
WARM_UPS = 3
HOST_CALLS = 50

Call = Callable[[], object]


def seconds_per_call(call: Call, repeats: int) -> float:
    """By the wall clock."""
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats


def time_in_turns(
    calls: Mapping[str, Call], seconds: float, sample: Callable[[Call, int], float] = seconds_per_call
) -> dict[str, list[float]]:
    """Seconds a call of each contender, one sample a round; the order rotates and turns around from round to round, so
    that nobody always follows the one that leaves the caches cold.

    Rounds go on for about `seconds`, within `FEWEST_ROUNDS` and `MOST_ROUNDS`; before them each runs twice unmeasured.
    `sample(call, repeats)` takes a sample: `seconds_per_call` or an `EventTimer`.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / sample(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    started = perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and perf_counter() - started > seconds:
            break
        turns = order[done % len(order) :] + order[: done % len(order)]
        for name in turns if done % 2 == 0 else reversed(turns):
            samples[name].append(sample(calls[name], repeats[name]))
    return samples


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Spread of our time over theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


# ---- on a GPU: replays of captured graphs, by CUDA events ------------------------------------------------------------


def captured(call: Call, device: torch.device) -> Call:
    """Replay of `call`, everything that it queued on `device` captured into a CUDA graph.

    Raises:
        RuntimeError: it does what a graph cannot hold, such as waiting for the GPU.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def copies_beyond_cache(size: int) -> int:
    """How many copies of inputs of `size` bytes it takes that none is in the L2 cache when its turn comes."""
    return min(max(1, math.ceil(ROTATED_BYTES / max(size, 1))), MOST_COPIES)


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that runs the next of `calls` each time: rotating buffers, where each has inputs of its own."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


class EventTimer:
    """Seconds of a call by events around it: the sampler of `time_in_turns`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Call, repeats: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def peak_beside_inputs(call: Call, device: torch.device) -> int:
    """The most bytes that PyTorch had allocated during `call`, less what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def host_seconds(call: Call, device: torch.device) -> float:
    """How long the CPU takes to queue one call, the GPU not waited for."""
    for _ in range(WARM_UPS):
        call()
    samples = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        samples.append(seconds_per_call(call, HOST_CALLS))
    torch.cuda.synchronize(device)
    return statistics.median(samples)
