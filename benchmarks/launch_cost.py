"""The host's time for a call of a Triton op that is compiled: `python -m benchmarks launch-cost`.

Measured without a GPU: the wrappers, the torch op, Triton's own launch path (argument types, cache lookup) are real;
the last step, Triton's C launcher and the driver's launch call, is replaced by a function that does nothing, and the
tensors lie on the CPU. So a GPU's host pays this and the driver's few microseconds for each kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import route_kernels as rk
from route_kernels import backends
from route_kernels.testing import call, named_tensors, sample_arguments

from .device import circumstances

ARCHITECTURE = "sm90"
BATCH = 5


@dataclass(frozen=True)
class Cost:
    """Cost of one call in microseconds, the least mean of a batch."""

    op: str
    direction: str
    launches: int  # kernels of the call
    microseconds: float  # of the public call
    wrapper: float  # of it in the op's function in `route_kernels.triton`, launches included


class StubbedDriver:
    """Stands in for Triton's driver: there is one device, and binaries are loaded and launched by doing nothing."""

    def __init__(self, target: Any):
        self.target = target
        self.utils = self
        self.launches = 0

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), 1, 128, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


def stubbed() -> StubbedDriver:
    """Makes this process launch on a GPU that is not there; there is no way back.

    Raises:
        RuntimeError: triton was imported as an interpreter.
    """
    import triton

    from route_kernels.triton import availability, block_sizes

    from .variants import TARGETS

    if availability.interpreted():
        raise RuntimeError("the interpreter launches nothing: unset TRITON_INTERPRET")
    driver = StubbedDriver(TARGETS[ARCHITECTURE])
    triton.runtime.driver.set_active(driver)
    mock.patch.object(availability, "_known_obstacle", lambda device_type, index: "").start()
    mock.patch.object(block_sizes, "architecture", lambda device: ARCHITECTURE).start()
    mock.patch.object(block_sizes, "tuned_settings", lambda *lookup: None).start()
    return driver


def costs(driver: StubbedDriver, ops: Sequence[str], repeat: int) -> Iterator[Cost]:
    """Forward without autograd, then backward alone, of the first differentiable sample of each op."""
    for op in ops:
        arguments = next(iter(sample_arguments(op, torch.bfloat16).values()))
        wanted = [tensor for _, tensor in named_tensors(arguments) if tensor.requires_grad]
        with rk.backend("triton"):

            def forward(op=op, arguments=arguments) -> None:
                with torch.no_grad():
                    call(op, arguments)

            yield _cost(driver, op, "forward", forward, repeat)
            if wanted:
                output = call(op, arguments)
                grad_output = torch.ones_like(output)

                def backward(output=output, wanted=wanted, grad_output=grad_output) -> None:
                    torch.autograd.grad(output, wanted, grad_output, retain_graph=True)

                yield _cost(driver, op, "backward", backward, repeat)


def _cost(driver: StubbedDriver, op: str, direction: str, step: Callable[[], None], repeat: int) -> Cost:
    original, within = backends.kernel(op, direction, "triton"), [0.0]

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments)
        finally:
            within[0] += time.perf_counter() - start

    step()  # compiles
    before = driver.launches
    step()
    launches = driver.launches - before
    with mock.patch.object(backends, "kernel", lambda *_: timed):
        wrapper = min(_batch(step, lambda: within[0]) for _ in range(repeat))
    whole = min(_batch(step, time.perf_counter) for _ in range(repeat))
    return Cost(op, direction, launches, round(whole, 1), round(wrapper, 1))


def _batch(step: Callable[[], None], clock: Callable[[], float]) -> float:
    """Microseconds of a step by this clock, the mean of a batch."""
    start = clock()
    for _ in range(BATCH):
        step()
    return (clock() - start) / BATCH * 1e6


def table(found: Sequence[Cost]) -> Iterator[str]:
    """Lines for the terminal."""
    yield f"{'op':22}{'direction':11}{'kernels':>8}{'call, us':>10}{'of it wrapper and launches, us':>33}"
    for cost in found:
        yield f"{cost.op:22}{cost.direction:11}{cost.launches:8}{cost.microseconds:10.1f}{cost.wrapper:33.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
    parser = argparse.ArgumentParser(prog="python -m benchmarks launch-cost", description=__doc__)
    parser.add_argument("--op", action="append", choices=rk.backends.OPS, help="may be repeated [all]")
    parser.add_argument("--repeat", type=int, default=400, metavar="N", help="timed batches [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = list(costs(stubbed(), args.op or rk.backends.OPS, args.repeat))
    print("\n".join(table(found)))
    if args.json:
        content: Mapping[str, Any] = {**circumstances(), "costs": [asdict(cost) for cost in found]}
        args.json.write_text(json.dumps(content, indent=1))
    return 0
