"""s_i = (1/N) sum_{j != i} relu(x^_i . x^_j): a tile of cosines at a time, summed and forgotten.

A program owns BLOCK_N queries of one image and walks over all queries, so each sum has one order and there are no
atomics. Roofline: 2 B N^2 C FLOP in `tl.dot`; x comes once from memory, then from the cache: N / BLOCK_N times B N C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .interpreter import dot, rounded
from .launch import config, input_precision, launch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .variants import Variant

KERNEL = "query_similarity_relu"


@triton.jit
def _inverse_norm(squared_norm):
    return 1.0 / tl.maximum(tl.sqrt(squared_norm), 1e-12)


@triton.jit
def _rows(x_ptr, offs_n, offs_c, stride_xn, N, C):
    # [BLOCK_N, BLOCK_C]
    pointers = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs_c[None, :]
    return tl.load(pointers, mask=(offs_n[:, None] < N) & (offs_c[None, :] < C), other=0.0)


@triton.jit
def _squared_norm(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit
def query_similarity_relu(
    x_ptr,  # [B, N, C]
    output_ptr,  # [B, N]
    stride_xb, stride_xn,
    N, C,
    INPUT_PRECISION: tl.constexpr,
    ONE_CHUNK: tl.constexpr,  # C <= BLOCK_C: the rows of the program stay where they are
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    x_ptr += b * stride_xb
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)

    # [BLOCK_N, BLOCK_C]
    x_n = _rows(x_ptr, offs_n, offs_c, stride_xn, N, C)
    squared_n = _squared_norm(x_n)
    if not ONE_CHUNK:
        for c in range(BLOCK_C, C, BLOCK_C):
            squared_n += _squared_norm(_rows(x_ptr, offs_n, c + offs_c, stride_xn, N, C))

    # [BLOCK_N]
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        # [BLOCK_M, BLOCK_C]
        x_m = _rows(x_ptr, offs_m, offs_c, stride_xn, N, C)
        squared_m = _squared_norm(x_m)
        # [BLOCK_N, BLOCK_M]
        product = dot(x_n, tl.trans(x_m), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), INPUT_PRECISION)
        if not ONE_CHUNK:
            for c in range(BLOCK_C, C, BLOCK_C):
                chunk_n = _rows(x_ptr, offs_n, c + offs_c, stride_xn, N, C)
                chunk_m = _rows(x_ptr, offs_m, c + offs_c, stride_xn, N, C)
                squared_m += _squared_norm(chunk_m)
                product = dot(chunk_n, tl.trans(chunk_m), product, INPUT_PRECISION)
        # relu(x_n . x^_m): dividing by |x_n| > 0 can wait. Rows past N are zero, and a NaN stays one.
        product *= _inverse_norm(squared_m)[None, :]
        other = (offs_n[:, None] != offs_m[None, :]) | (product != product)
        total += tl.sum(tl.where(other & ~(product < 0), product, 0.0), 1)

    similarity = total * _inverse_norm(squared_n) / N
    tl.store(output_ptr + b * N + offs_n, rounded(similarity, output_ptr.dtype.element_ty), mask=offs_n < N)


def forward(x: torch.Tensor) -> torch.Tensor:
    """x [B, N, C], rows contiguous -> [B, N] in the dtype of x; one launch."""
    batch, queries, channels = x.shape
    output = torch.empty((batch, queries), dtype=x.dtype, device=x.device)
    settings = dict(config(KERNEL, x.device, x.dtype, N=queries, C=channels))
    chunk = settings["BLOCK_C"] = min(settings["BLOCK_C"], max(triton.next_power_of_2(channels), 16))
    launch(
        query_similarity_relu, (triton.cdiv(queries, settings["BLOCK_N"]), batch),
        x, output, x.stride(0), x.stride(1), queries, channels, input_precision(), channels <= chunk, **settings,
    )  # fmt: skip
    return output


def variants(architecture: str) -> Iterator[Variant]:
    """C of one and of several chunks, every dtype."""
    from .variants import DTYPES, recorded

    for dtype in DTYPES["query_similarity"]:
        for channels in (32, 256, 1024):
            x = torch.empty(2, 1100, channels, dtype=dtype, device="meta")
            label = f"{str(dtype).removeprefix('torch.')} C={channels}"
            yield from recorded("query_similarity", "forward", label, architecture, lambda x=x: forward(x))
