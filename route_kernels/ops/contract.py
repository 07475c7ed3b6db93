"""The vocabulary of the ops' contract checks: one error that names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence

import torch
from torch.autograd import forward_ad

from ..precision import FLOATING

_REAL = (float, int, torch.SymFloat, torch.SymInt, numbers.Real)

Dimension = tuple[str, int] | str
"""A free dimension by its name, or a (name, size) pair that is already bound; a size that has no name has ""."""


def expect_tensors(op: str, **arguments: object) -> None:
    """Raises TypeError unless every argument is a tensor with strides."""
    has_layout = not torch.compiler.is_compiling()  # which cannot tell it inside an autograd.Function's backward
    for name, argument in arguments.items():
        if not isinstance(argument, torch.Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(argument).__name__}")
        if has_layout and argument.layout is not torch.strided:
            raise TypeError(f"{op}: {name}: expected a tensor with strides, got layout {argument.layout}")


def expect_shape(op: str, argument: str, tensor: torch.Tensor, *dimensions: Dimension) -> None:
    """Raises ValueError unless `tensor` has these dimensions, e.g. `"M", ("D", 32)`."""
    shape = tensor.shape
    matches = len(shape) == len(dimensions)
    for size, dimension in zip(shape, dimensions, strict=False):
        matches = matches and (isinstance(dimension, str) or size == dimension[1])
    if not matches:
        expected = ", ".join(d if isinstance(d, str) else "=".join(filter(None, map(str, d))) for d in dimensions)
        raise ValueError(f"{op}: {argument}: expected shape [{expected}], got {list(shape)}")


def expect_floating(op: str, argument: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype] = FLOATING) -> None:
    """Raises TypeError unless `tensor` has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{op}: {argument}: expected dtype {names}, got {tensor.dtype}")


def expect_choice(op: str, argument: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{op}: {argument}: expected one of {', '.join(choices)}, got {value!r}")


def expect_same_device(op: str, first: tuple[str, torch.Tensor], **others: torch.Tensor | None) -> None:
    """Raises ValueError unless every tensor is on the device of the first."""
    name, tensor = first
    for argument, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{op}: {argument}: expected on {tensor.device} like {name}, got one on {other.device}")


def number(op: str, argument: str, value: object) -> float:
    """`value` as a float, if it is a real number or a tensor of one that has no gradient; such a tensor is read.

    Raises:
        TypeError: it is anything else.
    """
    if isinstance(value, torch.Tensor):
        value = number_or_tensor(op, argument, value).item()
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{op}: {argument}: expected a number, got {_brief(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {argument}: expected a number that a float can hold, got {_brief(value)}") from None


def number_or_tensor(op: str, argument: str, value: object, differentiable: bool = False) -> float | torch.Tensor:
    """`value` as a float, or as it is where it is a tensor of one real number; that is not read.

    Raises:
        TypeError: it is anything else, or such a tensor asks for a gradient and is not differentiable.
    """
    if not isinstance(value, torch.Tensor):
        return number(op, argument, value)
    if value.dim() > 0 or value.dtype == torch.bool or value.is_complex():
        shape, dtype = list(value.shape), value.dtype
        raise TypeError(f"{op}: {argument}: expected a number, got a tensor of shape {shape} and dtype {dtype}")
    if not differentiable and (value.requires_grad or has_tangent(value)):
        raise TypeError(f"{op}: {argument}: expected no gradient, got a tensor that requires one; detach it")
    return value


def integer(op: str, argument: str, value: object) -> int:
    """`value` as an int of 64 bits.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too large.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        try:
            value = operator.index(None if isinstance(value, bool) else value)
        except TypeError:
            raise TypeError(f"{op}: {argument}: expected ints, got {_brief(value)}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {argument}: expected ints of 64 bits, got {_brief(value)}")
    return value


def _brief(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    return repr(value)[:60] if isinstance(value, int | float | str) else type(value).__name__


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward-mode differentiation goes through the tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself where its last dimension is contiguous (any other strides), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [T, C], each row contiguous; a copy only where the strides leave no other way."""
    return last_dim_contiguous(x).reshape(-1, x.shape[-1])


def may_be_differentiated(*tensors: torch.Tensor) -> bool:
    """Whether a gradient may be asked for. Under torch.vmap a tensor does not tell whether it requires one."""
    return torch.is_grad_enabled() and (
        torch._C._are_functorch_transforms_active() or any(tensor.requires_grad for tensor in tensors)
    )


def unsupported(op: str, what: str) -> str:
    """The error of a way to differentiate that only plain PyTorch has."""
    return (
        f"{op}: {what} not supported by the fused kernels; "
        'use `with route_kernels.backend("reference"):` for the plain PyTorch form'
    )
