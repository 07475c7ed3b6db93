"""Peak memory of one call, forward and backward, in a process of its own.

    python -m benchmarks peak fused 16384

prints JSON. The peak is VmHWM: ru_maxrss would count what the parent process had when it started this one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from route_kernels.testing import Arguments, map_tensors, outcome

from .contenders import PLAIN_SDPA
from .device import ROOT
from .measure import Results, complaint, yardstick
from .ops.routed_attention import EAGER_ROUTING, ROUTED_ATTENTION, attention_arguments

CONTENDERS = {"fused": ROUTED_ATTENTION, "plain": PLAIN_SDPA, "eager": EAGER_ROUTING}
CHECKED_ROWS = 64
QUERY_SIDE = ("sup_q", "del_q", "gate_q")


@dataclass(frozen=True)
class MemoryCase:
    """One row: contender `key` at B 1, H 8, D 32 and `queries`; the whole process stays below `target_bytes`."""

    key: str
    queries: int
    quick: bool = False
    target_bytes: int | None = None


CASES = (
    *(MemoryCase(key, 2048, quick=True) for key in CONTENDERS),
    *(MemoryCase(key, 4096) for key in CONTENDERS),
    MemoryCase("plain", 16384),
    MemoryCase("fused", 16384, target_bytes=1_500_000_000),
)


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and the peak only
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_bytes() -> int:
    """The greatest resident size that this process has had."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Bytes that are resident now."""
    return _status_bytes("VmRSS")


def wrong_rows(found: Results, arguments: Arguments, grad_output: Tensor, call: Callable[..., Tensor]) -> str | None:
    """The first fault in `CHECKED_ROWS` rows of the output and of the query side's gradients, or None.

    Those rows need all keys and values but no other row, so that the exact result is small enough to compute.
    """
    rows = torch.linspace(0, grad_output.shape[2] - 1, CHECKED_ROWS).long()

    def of_rows(tensor: Tensor) -> Tensor:
        return tensor.detach().index_select(-2, rows)

    few = map_tensors(arguments, torch.Tensor.detach)
    few["query"] = of_rows(few["query"]).requires_grad_()
    if "routing" in few:
        side = {name: of_rows(getattr(few["routing"], name)).requires_grad_() for name in QUERY_SIDE}
        few["routing"] = few["routing"]._replace(**side)
    yardsticks = yardstick(call, few, of_rows(grad_output))
    checked = {name: of_rows(found[name]) for name in yardsticks[0]}
    return complaint(checked, *yardsticks)


def measure(key: str, queries: int) -> dict[str, Any]:
    """Peak and what was resident before the call, in bytes; or, where the result is wrong, the failure alone."""
    contender = CONTENDERS[key]
    arguments = contender.taken(attention_arguments(1, queries))
    grad_output = torch.randn(arguments["query"].shape, generator=torch.Generator().manual_seed(1))
    before = resident_bytes()
    started = perf_counter()
    found = outcome(contender.call, arguments, grad_output)
    seconds, peak = perf_counter() - started, peak_bytes()
    wrong = wrong_rows(found, arguments, grad_output, contender.formula)
    if wrong is not None:
        return {"failure": wrong}
    return {"peak_bytes": peak, "before_bytes": before, "seconds_once": round(seconds, 3)}


def measured_apart(case: MemoryCase) -> dict[str, Any]:
    """A row of the results, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "peak", case.key, str(case.queries)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        result = json.loads(done.stdout)
    else:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        result = {"failure": f"the process ended with {done.returncode}: {last}"}
    row = {"op": "routed_attention", "case": f"B 1 N {case.queries}", "pass": "forward + backward"}
    row |= {"contender": CONTENDERS[case.key].name, "failure": None, "target_bytes": case.target_bytes, **result}
    if case.target_bytes is not None and row["failure"] is None:
        row["target_met"] = row["peak_bytes"] < case.target_bytes
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks peak", description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("queries", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.contender, args.queries)))
    return 0
