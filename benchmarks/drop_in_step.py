"""One side of a drop-in in a process of its own, see `worker.py`: every step gives its seconds, loss and calls.

For `drop-ins`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from route_kernels.doctor.agreement import seed_everything
from route_kernels.doctor.fitting import applied
from route_kernels.doctor.training_step import loss_of
from route_kernels.testing import counted_calls

from .codebases import CODEBASES
from .worker import serve


def step(model: nn.Module, arguments: tuple | Mapping[str, Any]) -> dict[str, Any]:
    """Forward, loss and backward, always with the same random numbers; gradients are dropped afterwards."""
    seed_everything(0)
    with counted_calls() as calls:
        started = perf_counter()
        loss = loss_of(model(**arguments) if isinstance(arguments, Mapping) else model(*arguments))
        loss.backward()
        seconds = perf_counter() - started
    model.zero_grad(set_to_none=True)
    return {"seconds": seconds, "loss": loss.item(), "calls": dict(calls)}


def main(argv: Sequence[str]) -> int:
    choices: dict[str, Any] = json.loads(argv[0])
    torch.set_num_threads(choices["threads"])
    codebase, after, answers = CODEBASES[choices["key"]], choices["after"], sys.stdout
    with redirect_stdout(sys.stderr):  # what foreign packages print is no answer
        model, arguments = codebase.built(choices["side"])
        with applied([] if after is None else codebase.afters[after](model)):
            serve(partial(step, model, arguments), answers)
    return 0
