"""Functions that kernels share: a logarithm, boxes, and two that Triton's interpreter gets wrong in bfloat16."""

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


@triton.jit
def log_one_plus(e, TERMS: tl.constexpr):
    """log(1 + e) of e in [0, 1]: 2 artanh(s) = 2 sum_i s^(2i + 1) / (2i + 1), s = e / (2 + e) <= 1/3."""
    s = e / (2.0 + e)
    square = s * s
    total = square * 0.0 + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS):
        total = total * square + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2.0 * s * total


@triton.jit
def at_least(x, bound):
    """max(x, bound), a NaN for a NaN x."""
    return tl.where(x < bound, bound, x)


@triton.jit
def at_most(x, bound):
    return tl.where(x > bound, bound, x)


@triton.jit
def overlap_of(px0, py0, px1, py1, tx0, ty0, tx1, ty1):
    """Sides of the overlap and of the hull of two boxes, not clamped to 0; and the areas I, U, C of both."""
    width, height = at_most(px1, tx1) - at_least(px0, tx0), at_most(py1, ty1) - at_least(py0, ty0)
    hull_width, hull_height = at_least(px1, tx1) - at_most(px0, tx0), at_least(py1, ty1) - at_most(py0, ty0)
    inner = at_least(width, 0.0) * at_least(height, 0.0)
    area_p = at_least(px1 - px0, 0.0) * at_least(py1 - py0, 0.0)
    both = area_p + at_least(tx1 - tx0, 0.0) * at_least(ty1 - ty0, 0.0) - inner
    hull = at_least(hull_width, 0.0) * at_least(hull_height, 0.0)
    return width, height, hull_width, hull_height, inner, both, hull


@triton.jit
def generalized_iou(px0, py0, px1, py1, tx0, ty0, tx1, ty1, TINY: tl.constexpr):
    """I / U - (C - U) / C; 0 / 0 counts as 0."""
    _, _, _, _, inner, both, hull = overlap_of(px0, py0, px1, py1, tx0, ty0, tx1, ty1)
    return inner / at_least(both, TINY) - (hull - both) / at_least(hull, TINY)
