"""Marks for torch.compile: a function is a constant, or is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable)


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import torch's compilers, and triton with them."""
    function._dynamo_marked_constant = True
    return function


def not_traced(function: Function) -> Function:
    """`torch.compiler.disable`, which would import torch's compilers, too: no frame of it and below is compiled."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
