"""Two things that Triton's interpreter gets wrong in bfloat16; compiled, they are `tl.dot` and a cast."""

import triton
import triton.language as tl

from .availability import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, accumulator, INPUT_PRECISION: tl.constexpr):
    """accumulator + a @ b in float32. The interpreter multiplies bfloat16 as integers, so it is given float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, to the nearest. The interpreter cuts bfloat16 off, so it is rounded first."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
