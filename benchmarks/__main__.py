"""The one door to what is measured or counted: `python -m benchmarks WHAT`; `WHAT --help` has its options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "ops": "every op against its peers: verified, then timed in turns",
    "train-step": "what routing costs a training step, in time and memory",
    "memory-levels": "what each level of detector.memory costs a training step",
    "drop-ins": "a training step of other people's code, before and after an apply()",
    "loader": "images a second that training data come at",
    "kernel-time": "how much of a call on a CPU is its kernel",
    "launch-cost": "what a call of a Triton op costs the host",
    "static-report": "what the Triton and CUDA kernels compile to, for chips that need not be here",
    "memory-front": "memory against arithmetic: PyTorch's ways to keep less for backward, beside our levels",
    "gradient-errors": "errors of every gradient against float64, by level, of ours and of peers",
    "summing": "whether it matters in training how the gradient of value is summed",
    "peer-machine-code": "what peers' Triton kernels compile to, beside ours",
    "roofline": "the least work of each op, and the least time that a chip needs for it",
    "tune": "the fastest block sizes on this GPU",
    "tables": "results out of their JSON: for a terminal, or into the README",
    "gpu-report": "everything for whoever holds a GPU for ten minutes",
    "gpu-part": "of the report: one of its parts",
    "peak": "of ops: the peak memory of one call in this process",
    "stepper": "of train-step and memory-levels: steps of a detector in this process",
    "drop-in-step": "of drop-ins: steps of a codebase in this process",
}
"""By name, what each says of itself. The module has that name, and `main(argv)` returns the exit code."""

MODULES = {"ops": "test_ops", "tables": "report", "peak": "memory", "gpu-part": "gpu_parts"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of `COMMANDS`; returns its exit code, 2 where there is no such command."""
    name, *options = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in COMMANDS:
        module = MODULES.get(name, name.replace("-", "_"))
        return import_module(f"benchmarks.{module}").main(options)
    if name not in ("-h", "--help"):
        print(f"python -m benchmarks: expected one of {', '.join(COMMANDS)}, got {name}", file=sys.stderr)
        return 2
    print("usage: python -m benchmarks WHAT [options]\n")
    print("\n".join(f"  {each:15} {says}" for each, says in COMMANDS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
