"""The library `route_kernels` of Python-defined torch ops; `OPS` lists what has been registered."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .contract import no_second_derivative

_library = torch.library.Library("route_kernels", "DEF")
OPS: list[str] = []


def register(
    schema: str,
    kernel: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Defines `route_kernels::<schema>` with its real kernel, its fake (shapes only) and its autograd formula."""
    name = schema[: schema.index("(")]
    qualified = f"route_kernels::{name}"
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    OPS.append(name)


def register_backward(op: str, schema: str, kernel: Callable, fake: Callable) -> None:
    """Defines the backward op of `op`; differentiating it again is a clear error."""
    register(schema, kernel, fake, setup_context=lambda ctx, inputs, output: None, backward=no_second_derivative(op))
