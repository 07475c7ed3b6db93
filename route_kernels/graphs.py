"""What torch.compile takes as a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import torch's compilers, and triton with them."""
    function._dynamo_marked_constant = True
    return function
