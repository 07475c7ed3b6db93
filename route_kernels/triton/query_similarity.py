"""s_i = (1/N) sum_{j != i} relu(x^_i . x^_j): a tile of cosines at a time, summed and forgotten.

1/|x_i| is computed once, by a kernel of its own. Then a program owns BLOCK_N queries of one image and walks over all of
them, so each sum has one order and there are no atomics. Roofline: 2 B N^2 C FLOP in `tl.dot`, about three operations
beside it for each cosine; x comes once from memory and N / BLOCK_N times from the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .block_sizes import config
from .language import dot, rounded
from .launch import Grid, Kernel, blocks, input_precision, kept, padded

if TYPE_CHECKING:
    from collections.abc import Sequence


@triton.jit
def _rows(x_ptr, offs_n, offs_c, stride_xn, N, C, EVEN_C: tl.constexpr):
    # [BLOCK_N, BLOCK_C]
    pointers = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs_c[None, :]
    mask = offs_n[:, None] < N
    if not EVEN_C:
        mask = mask & (offs_c[None, :] < C)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _image_and_block(N, BLOCK_N: tl.constexpr):
    """Image and block of this program, on one axis of the grid: the others end at 65535."""
    blocks = tl.cdiv(N, BLOCK_N)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


@Kernel
@triton.jit
def query_inverse_norms(
    x_ptr,  # [B, N, C]
    inverse_norms_ptr,  # [B, N] float32
    stride_xb, stride_xn,
    N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, block = _image_and_block(N, BLOCK_N)
    x_ptr += b * stride_xb
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # [BLOCK_N]
    squared = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        # [BLOCK_N, BLOCK_C]
        x = _rows(x_ptr, offs_n, start + tl.arange(0, BLOCK_C), stride_xn, N, C, False).to(tl.float32)
        squared += tl.sum(x * x, 1)
    # 1 / max(|x|, eps)
    inverse = 1.0 / tl.maximum(tl.sqrt(squared), 1e-12)
    tl.store(inverse_norms_ptr + b * N + offs_n, inverse, mask=offs_n < N)


@triton.jit
def _cosine_sums(
    x_ptr, inverse_norms_ptr, x_n, offs_n, offs_m, stride_xn, N, C, SELF: tl.constexpr, ONE_CHUNK: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_j relu(x_n . x^_m) over one tile of queries, j != i where they may be the same (SELF)."""
    offs_c = tl.arange(0, BLOCK_C)
    # [BLOCK_N, BLOCK_N]
    product = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    if ONE_CHUNK:
        product = dot(x_n, tl.trans(_rows(x_ptr, offs_m, offs_c, stride_xn, N, C, EVEN_C)), product, PRECISION)
    else:
        for c in range(0, C, BLOCK_C):
            rows = _rows(x_ptr, offs_n, c + offs_c, stride_xn, N, C, EVEN_C)
            columns = _rows(x_ptr, offs_m, c + offs_c, stride_xn, N, C, EVEN_C)
            product = dot(rows, tl.trans(columns), product, PRECISION)
    # [1, BLOCK_N]; columns past N are 0
    inverse_norm = tl.load(inverse_norms_ptr + offs_m, mask=offs_m < N, other=0.0)[None, :]
    positive = tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL) * inverse_norm
    if SELF:
        positive = tl.where(offs_n[:, None] == offs_m[None, :], 0.0, positive)
    return tl.sum(positive, 1)


@Kernel
@triton.jit
def query_similarity_relu(
    x_ptr,  # [B, N, C]
    inverse_norms_ptr,  # [B, N] float32
    output_ptr,  # [B, N]
    stride_xb, stride_xn,
    N, C,
    PRECISION: tl.constexpr,
    ONE_CHUNK: tl.constexpr,  # C <= BLOCK_C: the rows of the program stay where they are
    EVEN_C: tl.constexpr,  # C is a multiple of BLOCK_C
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, block = _image_and_block(N, BLOCK_N)
    x_ptr += b * stride_xb
    inverse_norms_ptr += b * N
    first = block * BLOCK_N
    offs = tl.arange(0, BLOCK_N)
    offs_n = first + offs
    # [BLOCK_N, BLOCK_C]
    x_n = _rows(x_ptr, offs_n, tl.arange(0, BLOCK_C), stride_xn, N, C, EVEN_C)

    # [BLOCK_N]
    total = _cosine_sums(
        x_ptr, inverse_norms_ptr, x_n, offs_n, offs_n, stride_xn, N, C, True, ONE_CHUNK, EVEN_C, PRECISION, BLOCK_N,
        BLOCK_C,
    )  # fmt: skip
    for step in range(0, tl.cdiv(N, BLOCK_N) - 1):  # every other tile
        start = step * BLOCK_N
        offs_m = tl.where(start < first, start, start + BLOCK_N) + offs
        total += _cosine_sums(
            x_ptr, inverse_norms_ptr, x_n, offs_n, offs_m, stride_xn, N, C, False, ONE_CHUNK, EVEN_C, PRECISION,
            BLOCK_N, BLOCK_C,
        )  # fmt: skip

    # x_n . x^_m -> x^_n . x^_m
    inverse_norm = tl.load(inverse_norms_ptr + offs_n, mask=offs_n < N, other=0.0)
    tl.store(output_ptr + b * N + offs_n, rounded(total * inverse_norm / N, output_ptr.dtype.element_ty), offs_n < N)


def forward(x: torch.Tensor, output: torch.Tensor) -> None:
    """Fills output [B, N] of x [B, N, C], rows contiguous."""
    inverse_norms = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    norms, similarity = kept(_grids, (x,), input_precision())
    query_inverse_norms[norms](x, inverse_norms)
    query_similarity_relu[similarity](x, inverse_norms, output)


def _grids(tensors: Sequence[torch.Tensor], precision: str) -> tuple[Grid, Grid]:
    (x,) = tensors
    batch, queries, channels = x.shape
    sizes = (*x.stride()[:2], queries, channels)
    settings = _settings("query_inverse_norms", x)
    norms = Grid((batch * blocks(queries, settings["BLOCK_N"]),), *sizes, **settings)
    settings = _settings("query_similarity_relu", x)
    chunk = settings["BLOCK_C"]
    similarity = Grid(
        (batch * blocks(queries, settings["BLOCK_N"]),), *sizes, PRECISION=precision,
        ONE_CHUNK=channels <= chunk, EVEN_C=channels > 0 and channels % chunk == 0, **settings,
    )  # fmt: skip
    return norms, similarity


def _settings(kernel_name: str, x: torch.Tensor) -> dict[str, int]:
    """The table's, with no wider a chunk than C takes."""
    _, queries, channels = x.shape
    odd = int((channels | x.stride(0) | x.stride(1)) % 16 != 0)
    settings = config(kernel_name, x.device, x.dtype, N=queries, C=channels, ODD=odd)
    return {**settings, "BLOCK_C": min(settings["BLOCK_C"], padded(channels))}
