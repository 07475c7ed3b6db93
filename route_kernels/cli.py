"""route-kernels info | verify | bench | doctor | tune."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import route_kernels as rk

from . import native
from .backends import BACKENDS, OPS

DTYPES = ("float32", "bfloat16", "float16", "float64")
CHECKOUT = Path(__file__).parents[1]


def info() -> Iterator[str]:
    """The installation, and for each op which backend can run and why another cannot, line by line."""
    yield f"route-kernels {rk.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    yield f"machine         {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    if native.load_error is None:
        yield f"native kernels  loaded, SIMD level {native.simd_level()}"
    else:
        yield f"native kernels  none: {native.load_error}"
        yield "                the ops run on the reference backend (plain PyTorch: correct, slower)"
    if native.cuda_load_error is None:
        yield f"CUDA kernels    loaded, built for {native.cuda_build()}"
    else:
        yield f"CUDA kernels    none: {native.cuda_load_error}"
    tables = {op: rk.available_backends(op) for op in OPS}
    width = max(map(len, OPS))
    yield ""
    yield "  ".join(["op".ljust(width), *(f"{name:9}" for name in BACKENDS)]).rstrip()
    for op, table in tables.items():
        answers = ["yes" if table[name][0] else "no" for name in BACKENDS]
        yield "  ".join([op.ljust(width), *(f"{answer:9}" for answer in answers)]).rstrip()
    yield ""
    for name in BACKENDS:
        reasons: dict[str, list[str]] = {}
        for op, table in tables.items():
            reasons.setdefault(table[name][1].replace(f" for {op}", ""), []).append(op)
        for reason, ops in reasons.items():
            yield f"{name:9}  {reason}" + ("" if len(ops) == len(OPS) else f" ({', '.join(ops)})")


def of_checkout(command: str, purpose: str, options: Sequence[str]) -> int:
    """Run a benchmark of the checkout that this package is installed from; they are no part of the wheel."""
    if not (CHECKOUT / "benchmarks" / "__main__.py").exists():
        print(
            f"route-kernels: the benchmarks are part of the repository: clone it and run `{purpose}`", file=sys.stderr
        )
        return 1
    return subprocess.call([sys.executable, "-m", "benchmarks", command, *options], cwd=CHECKOUT)


def doctor(arguments: argparse.Namespace) -> int:
    """Examine a user's model; the exit code is 0 where both ways agree, 1 where they differ, 2 where none can tell."""
    from .doctor import UNANSWERED, UsageError, diagnose

    try:
        return diagnose(arguments.target, dtype=arguments.dtype, repeat=arguments.repeat, seed=arguments.seed)
    except UsageError as error:
        print(f"route-kernels doctor: {error}", file=sys.stderr)
        return UNANSWERED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="route-kernels", description="Fused training kernels for DETR detectors.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | verify | bench | doctor | tune")
    commands.add_parser("info", help="what is installed, and which backend runs each op")
    check = commands.add_parser(
        "verify",
        help="hold every op, dtype and backend that runs here to its promises, in less than a minute",
        description="Runs every op, dtype and backend of this machine against float64, on memory filled with NaN, at "
        "ragged sizes, twice, and with 1, 3 and all threads. Exit code: 0 every promise holds, 1 one does not.",
    )
    check.add_argument("--gpu", action="store_true", help="also the kernels of the first GPU")
    check.add_argument("--json", type=Path, metavar="FILE", help="write what was found, with versions and devices")
    commands.add_parser(
        "bench", help="verify, then time; options as `python -m benchmarks ops`, for one --quick", add_help=False
    )
    examine = commands.add_parser(
        "doctor",
        help="run a training step of your model both ways: agreement, time, memory",
        description="Builds your model, applies the integrations that fit, and runs a training step with its own code "
        "and with ours. Exit code: 0 both agree, 1 they differ, 2 no answer (usage error, or nothing applied).",
    )
    examine.add_argument(
        "target",
        metavar="TARGET",
        help="your.module:function or file.py:function; the function returns a model, or (model, inputs) with inputs "
        "a tuple or dict of arguments or a function that returns one. A transformers model needs no inputs",
    )
    examine.add_argument("--dtype", choices=DTYPES, help="of weights and inputs for time and memory [the model's]")
    examine.add_argument("--repeat", type=int, default=5, metavar="N", help="timed steps each way [%(default)s]")
    examine.add_argument("--seed", type=int, default=0, metavar="N", help="[%(default)s]")
    commands.add_parser(
        "tune",
        help="measure block sizes of the Triton kernels on this GPU and keep the fastest; options: --op, --dtype",
        add_help=False,
    )
    commands.add_parser("memory", add_help=False)  # it was here until it became a command of the detector
    args, options = parser.parse_known_args(argv)
    if args.command == "bench":
        return of_checkout("ops", "make bench", options)
    if args.command == "tune":
        return of_checkout("tune", "route-kernels tune", options)
    if args.command == "memory":
        print(
            "route-kernels memory: it is now `route-detr memory` (pip install 'route-kernels[detr]')", file=sys.stderr
        )
        return 2
    if options:
        parser.error(f"unknown options: {' '.join(options)}")
    if args.command == "doctor":
        return doctor(args)
    if args.command == "verify":
        from .verify import verify

        return verify(args.gpu, args.json)
    print("\n".join(info()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
