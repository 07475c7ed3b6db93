"""`route-kernels tune`: which settings of the kernels are fastest on this GPU, kept for the launches to come.

For each case, every kernel that the op launches is tried with every entry that its table has for the dtype, whatever
the architecture, then with neighbours of the fastest; one kernel at a time, the others at their best so far.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import route_kernels as rk
from route_kernels.backends import OPS
from route_kernels.testing import Arguments, call, declaration, named_tensors
from route_kernels.triton import block_sizes
from route_kernels.triton.availability import limits
from route_kernels.triton.block_sizes import INTERPRETER, TABLE, Rows, Settings

from . import ops
from .launches import Lookup, forced, lookups

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
Timer = Callable[[Callable[[], object]], float]  # milliseconds of a call

SIZES: Mapping[str, Mapping[str, Arguments]] = {op: ops.declaration(op).TUNED for op in OPS}
"""By op and name, shapes that detectors have."""


@dataclass(frozen=True)
class Case:
    """A call of one op, with its backward where it has one."""

    op: str
    name: str
    dtype: torch.dtype
    sizes: Mapping[str, Any]

    def step(self, device: torch.device) -> Callable[[], object]:
        """Runs it on the Triton backend, on arguments that are made once."""
        arguments = declaration(self.op).arguments(**self.sizes, dtype=self.dtype, device=str(device))
        wanted = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]

        def run() -> object:
            with rk.backend("triton"):
                output = call(self.op, arguments)
            return torch.autograd.grad(output, wanted, torch.ones_like(output)) if wanted else output

        return run


@dataclass(frozen=True)
class Choice:
    """The settings that won for one kernel, and the milliseconds of the whole step with them and before."""

    key: str
    settings: Settings
    milliseconds: float
    before: float


def cases(ops: Iterable[str], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """Every shape of `SIZES`, in the dtypes that the op's kernels take."""
    for op in ops:
        for dtype in dtypes:
            if dtype in limits(op).dtypes:
                yield from (Case(op, name, dtype, sizes) for name, sizes in SIZES[op].items())


def entries(lookup: Lookup) -> list[Settings]:
    """The different settings that the kernel's table has for the dtype, on any architecture."""
    fitting = [
        entry.settings
        for entry in TABLE[lookup.kernel_name]
        if entry.architectures != (INTERPRETER,) and (entry.dtypes is None or lookup.dtype in entry.dtypes)
    ]
    return [settings for place, settings in enumerate(fitting) if settings not in fitting[:place]]


def neighbours(settings: Settings) -> list[Settings]:
    """Half and twice the warps, one pipeline stage less and more."""
    warps, stages = settings["num_warps"], settings["num_stages"]
    return [
        *({**settings, "num_warps": number} for number in (warps // 2, warps * 2) if 1 <= number <= 8),
        *({**settings, "num_stages": number} for number in (stages - 1, stages + 1) if 1 <= number <= 5),
    ]


def tune(case: Case, device: torch.device, timer: Timer) -> list[Choice]:
    """The settings that are faster than those in use; a candidate that does not fit the GPU is passed over."""
    step = case.step(device)
    with lookups() as found:
        step()
    best: dict[str, Settings] = {}
    choices = []
    for lookup in sorted(found, key=repr):
        name = lookup.kernel_name
        before = _time(step, timer, best)
        settings, least = _fastest(step, timer, best, name, entries(lookup), None, before)
        if settings is not None:
            best[name], least = _fastest(step, timer, best, name, neighbours(settings), settings, least)
            choices.append(
                Choice(block_sizes.tuned_key(name, lookup.dtype, dict(lookup.sizes)), best[name], least, before)
            )
    return choices


def _fastest(step, timer: Timer, best, name: str, candidates, settings, least: float):
    """(settings, their time): the given ones, or the candidates that are faster."""
    for candidate in candidates:
        milliseconds = _time_or_none(step, timer, {**best, name: candidate})
        if milliseconds is not None and milliseconds < least:
            settings, least = candidate, milliseconds
    return settings, least


def _time(step: Callable[[], object], timer: Timer, settings_of: Mapping[str, Settings]) -> float:
    """Time of the step with these settings, by kernel name."""
    with ExitStack() as stack:
        for name, settings in settings_of.items():
            stack.enter_context(forced(name, settings))
        return timer(step)


def _time_or_none(step, timer: Timer, settings_of: Mapping[str, Settings]) -> float | None:
    """None where the settings ask for more than the GPU has, or a kernel does not compile with them."""
    from triton import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return _time(step, timer, settings_of)
    except (OutOfResources, CompilationError, PTXASError):
        return None


def gpu_timer(step: Callable[[], object]) -> float:
    """The median of 100 ms of calls, after the call that compiles and 25 ms of warm-up."""
    from triton.testing import do_bench

    return do_bench(step, warmup=25, rep=100, return_mode="median")


def keep(device: torch.device, choices: Iterable[Choice]) -> None:
    """Adds the choices to this GPU's cache file; what it had under the same keys is replaced."""
    file, circumstances = block_sizes.tuned_path(device), block_sizes.circumstances(device)
    rows = block_sizes.read_tuned(file, circumstances) if file.exists() else {}
    write(file, circumstances, {**rows, **{choice.key: dict(choice.settings) for choice in choices}})


def write(file: Path, circumstances: Mapping[str, Any], rows: Rows) -> None:
    """Writes the whole file or, interrupted, nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump({"circumstances": circumstances, "rows": rows}, stream, indent=1)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def report(case: Case, choices: Iterable[Choice]) -> Iterator[str]:
    """Lines for the terminal."""
    dtype = str(case.dtype).removeprefix("torch.")
    yield f"{case.op}, {case.name}, {dtype}"
    lines = [
        f"  {choice.before:.4f} -> {choice.milliseconds:.4f} ms  {choice.key}: "
        + ", ".join(f"{name}={value}" for name, value in choice.settings.items())
        for choice in choices
    ]
    yield from lines or ["  nothing is faster than what is in use"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures on the GPU at hand and keeps the fastest for the launches to come."""
    parser = argparse.ArgumentParser(
        prog="route-kernels tune",
        description="Takes minutes. The fastest settings are kept in the user's cache directory, or in the file that "
        "ROUTE_KERNELS_TUNED names, and go before the built-in table; they are for this GPU, Triton and version only.",
    )
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated [all]")
    parser.add_argument("--dtype", action="append", choices=DTYPE_NAMES, help="may be repeated [all]")
    args = parser.parse_args(argv)
    ops = args.op or OPS
    for op in ops:
        runs, reason = rk.can_run(op, "triton")
        if not runs or not torch.cuda.is_available():
            print(f"route-kernels tune: needs a GPU: {'none was found' if runs else reason}", file=sys.stderr)
            return 1
    device = torch.device("cuda", torch.cuda.current_device())
    for case in cases(ops, [getattr(torch, dtype) for dtype in args.dtype or DTYPE_NAMES]):
        choices = tune(case, device, gpu_timer)
        keep(device, choices)
        print("\n".join(report(case, choices)), flush=True)
    print(f"kept in {block_sizes.tuned_path(device)}")
    return 0
