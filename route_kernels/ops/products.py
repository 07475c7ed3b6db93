"""Parts of ops made of PyTorch's own matrix products: rows in chunks, products in a dtype, sums in a longer one.

Such an op runs on every device. It is an op and not a composition so that a compiler cannot keep what it recomputes.
Its scratch memory is one tensor, in parts; the op returns it as one more output, so that fake tensors count what real
ones take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch

from .. import backends, precision
from .contract import expect_floating


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of products under autocast; None where it is off, and for float64, which autocast leaves alone."""
    return None if x.dtype == torch.float64 else precision.autocast_dtype(x.device)


def plain_form() -> ModuleType | None:
    """`reference` or `eager` where one is requested, `reference` for a graph that shall run without this package."""
    requested = backends.requested_backend()
    return backends.PLAIN.get("reference" if requested is None and backends.exporting() else requested)


def expect_dtypes(op: str, dtype: torch.dtype | None, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises TypeError unless all are floating and, without autocast (dtype None), of the dtype of x."""
    expect_floating(op, "x", x)
    for name, tensor in others.items():
        if tensor is not None:
            expect_floating(op, name, tensor, (x.dtype,) if dtype is None else precision.FLOATING)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [T, C]; a copy only where the strides leave no other way."""
    return x.reshape(count_of_rows(x), x.shape[-1])


def count_of_rows(x: torch.Tensor) -> int:
    """T of [..., C], also where C = 0."""
    return math.prod(x.shape[:-1])


def rows_of_chunk(rows: int, chunks: int) -> int:
    """How many rows each of at most `chunks` chunks has."""
    return -(-rows // chunks)


def in_dtype(x: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """x itself (no buffer), or its copy in the first rows of the buffer, which has the dtype."""
    return x if buffer is None else buffer[: x.shape[0]].copy_(x)


def linear_into(output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """output [T, O] = x [T, C] weight^T [C, O] + bias [O]."""
    if bias is None:
        torch.mm(x, weight.t(), out=output)
    else:
        torch.addmm(bias, x, weight.t(), out=output)


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, product: torch.Tensor | None, first: bool
) -> None:
    """total [O, C] += left^T [O, T] right [T, C], or = if `first`; `product` holds one of a shorter dtype."""
    if product is None:
        total.addmm_(left.t(), right, beta=0 if first else 1)
    else:
        torch.mm(left.t(), right, out=product)
        total.copy_(product) if first else total.add_(product)


def sum_of_rows(x: torch.Tensor) -> torch.Tensor:
    """[T, O] -> [O] in the dtype of sums."""
    return x.sum(0, dtype=precision.accumulate_dtype(x.dtype))


# ---- scratch memory -------------------------------------------------------------------------------------------------

ALIGNMENT = 512  # bytes, as PyTorch's CUDA allocator

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a part."""


def new_workspace(parts: Sequence[Part], like: torch.Tensor) -> torch.Tensor:
    """A tensor of bytes on the device of `like`, real or fake, that holds the parts."""
    return like.new_empty(sum(_padded_bytes(part) for part in parts), dtype=torch.uint8)


def parts_of(workspace: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """The parts as contiguous tensors, one after the other; what is between them becomes 0, as outputs repeat."""
    found, start = [], 0
    for shape, dtype in parts:
        end = start + math.prod(shape) * dtype.itemsize
        found.append(workspace[start:end].view(dtype).view(shape))
        start += _padded_bytes((shape, dtype))
        if end < start:
            workspace[end:start].zero_()
    return found


def _padded_bytes(part: Part) -> int:
    shape, dtype = part
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
