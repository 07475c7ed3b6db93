"""Inputs that break the contract of an op, and the one error that each must give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .arguments import Arguments

Row = tuple[str, str, Callable[[Any], Any], type[Exception], str]
"""Name of the case, argument, what is done to it, error and message."""


class BadInput(NamedTuple):
    """A call of `op` that is right but for one argument."""

    op: str
    name: str
    arguments: Callable[[], Arguments]
    error: type[Exception]
    message: str  # regular expression: names the argument, what was expected, what came


def bad_inputs(op: str, good: Callable[[], Arguments], *rows: Row) -> tuple[BadInput, ...]:
    """Calls that differ from a good one in one argument; "routing.sup_q" is a field of `routing`."""

    def changed(argument: str, change: Callable[[Any], Any]) -> Arguments:
        arguments = good()
        name, _, field = argument.partition(".")
        if field:
            arguments[name] = arguments[name]._replace(**{field: change(getattr(arguments[name], field))})
        else:
            arguments[name] = change(arguments.get(name))
        return arguments

    return tuple(
        BadInput(op, f"{argument}: {name}", partial(changed, argument, change), error, f"^{op}: {message}")
        for name, argument, change, error, message in rows
    )


def to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.detach().to(dtype)


def without_last(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.ones(shape, dtype=dtype)


def no_numbers(argument: str, optional: bool = False) -> tuple[Row, ...]:
    """Values that none of the ops' numbers may have."""
    rows = (
        ("a text", argument, constant("0.5"), TypeError, rf"{argument}: expected a number, got '0.5'"),
        ("a bool", argument, constant(True), TypeError, rf"{argument}: expected a number, got True"),
        (
            "a bool tensor",
            argument,
            lambda _: torch.tensor(True),
            TypeError,
            rf"{argument}: expected a number, got a tensor .*torch.bool",
        ),
        ("a complex number", argument, constant(0.5j), TypeError, rf"{argument}: expected a number, got complex"),
        (
            "a vector",
            argument,
            lambda _: torch.ones(1),
            TypeError,
            rf"{argument}: expected a number, got a tensor of shape \[1\] and",
        ),
        (
            "with gradient",
            argument,
            lambda _: torch.tensor(0.5, requires_grad=True),
            TypeError,
            rf"{argument}: expected no gradient, got a tensor that requires one",
        ),
        (
            "huge",
            argument,
            constant(10**400),
            ValueError,
            rf"{argument}: expected a number that a float can hold, got an int of 1329 bits",
        ),
    )
    return rows if optional else (("none", argument, constant(None), TypeError, f"{argument}: .* got NoneType"), *rows)


def no_integers(argument: str, around: Callable[[Any], Any] = lambda number: number) -> tuple[Row, ...]:
    """Values that none of the ops' integers may have; `around` puts one where the argument has it."""
    return (
        ("none in it", argument, constant(around(None)), TypeError, f"{argument}: expected ints, got NoneType"),
        ("a text in it", argument, constant(around("2")), TypeError, f"{argument}: expected ints, got '2'"),
        ("a bool in it", argument, constant(around(True)), TypeError, f"{argument}: expected ints, got True"),
        ("a fraction in it", argument, constant(around(2.5)), TypeError, f"{argument}: expected ints, got 2.5"),
        (
            "2^63 in it",
            argument,
            constant(around(2**63)),
            ValueError,
            f"{argument}: .* got .*9223372036854775808",
        ),
        ("2^99 in it", argument, constant(around(2**99)), ValueError, f"{argument}: .* got an int of 100 bits"),
        (
            "-2^64 in it",
            argument,
            constant(around(-(2**64))),
            ValueError,
            f"{argument}: .* got an int of 65 bits",
        ),
    )
