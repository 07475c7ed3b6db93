#pragma once
// The formulas of multi-scale deformable attention, each forward beside its adjoint, for host and device.
// A level is h rows of w pixels; pixel coordinates have the centre of the first pixel at 0.

#include "../common/host_device.h"

namespace rk::ms_deform_attn {

// ---- sampling location -> pixel coordinate, in one dimension of `size` pixels ----------------------------------

template <typename T>
RK_HOST_DEVICE T pixel_of_location(T location, T size) {
  return location * size - T(0.5);
}

template <typename T>
RK_HOST_DEVICE T location_adjoint(T grad_pixel, T size) {
  return grad_pixel * size;
}

// (reference + offset / size) size - 0.5
template <typename T>
RK_HOST_DEVICE T pixel_of_point(T reference, T offset, T size) {
  return reference * size + (offset - T(0.5));
}

template <typename T>
struct PointAdjoint {
  T offset, reference;
};

template <typename T>
RK_HOST_DEVICE PointAdjoint<T> point_adjoint(T grad_pixel, T size) {
  return {grad_pixel, grad_pixel * size};
}

// (center + offset / P extent 0.5) size - 0.5; half_step = 0.5 / P
template <typename T>
RK_HOST_DEVICE T pixel_of_box(T center, T extent, T offset, T half_step, T size) {
  return (center + offset * half_step * extent) * size - T(0.5);
}

template <typename T>
struct BoxAdjoint {
  T offset, center, extent;
};

template <typename T>
RK_HOST_DEVICE BoxAdjoint<T> box_adjoint(T grad_pixel, T extent, T offset, T half_step, T size) {
  const T grad_location = grad_pixel * size;
  return {grad_location * half_step * extent, grad_location, grad_location * (offset * half_step)};
}

// ---- bilinear sample --------------------------------------------------------------------------------------------

// The cell between four pixels that a sample falls into: corners (row, column) to (row + 1, column + 1), of which
// only those within the level exist. A sample that is NaN or a pixel or more outside has no corner.
template <typename T>
struct Cell {
  int32_t row, column;
  T fraction_x, fraction_y;
  bool inside, top, bottom, left, right;  // whether these rows and columns of corners exist
};

template <typename T>
RK_HOST_DEVICE Cell<T> cell_of(T x, T y, int32_t height, int32_t width) {
  // before any conversion to an integer; & because NaN must fail every comparison and vectors have no branches
  const bool inside = (x > T(-1)) & (x < T(width)) & (y > T(-1)) & (y < T(height));
  const T safe_x = inside ? x : T(0), safe_y = inside ? y : T(0);
  const int32_t toward_zero_x = int32_t(safe_x), toward_zero_y = int32_t(safe_y);
  const int32_t column = toward_zero_x - (T(toward_zero_x) > safe_x ? 1 : 0);
  const int32_t row = toward_zero_y - (T(toward_zero_y) > safe_y ? 1 : 0);
  return {
      row,
      column,
      safe_x - T(column),
      safe_y - T(row),
      inside,
      bool(inside & (row >= 0)),
      bool(inside & (row < height - 1)),
      bool(inside & (column >= 0)),
      bool(inside & (column < width - 1))};
}

// The weights of the four corners in a sample of the given weight.
template <typename T>
struct CornerWeights {
  T top_left, top_right, bottom_left, bottom_right;
};

template <typename T>
RK_HOST_DEVICE CornerWeights<T> corner_weights(T fraction_x, T fraction_y, T weight) {
  const T above = weight * (T(1) - fraction_y), below = weight * fraction_y;
  return {above * (T(1) - fraction_x), above * fraction_x, below * (T(1) - fraction_x), below * fraction_x};
}

// s_c = grad_output . value_c of the four corners (0 where there is none); the gradients of one sample's value by its
// weight and, before multiplying by the weight, by its pixel coordinates.
template <typename T>
struct SampleAdjoint {
  T weight, x, y;
};

template <typename T>
RK_HOST_DEVICE SampleAdjoint<T> sample_adjoint(T s00, T s01, T s10, T s11, T fraction_x, T fraction_y) {
  const T above = s00 + fraction_x * (s01 - s00), below = s10 + fraction_x * (s11 - s10);
  const T left_to_right = (T(1) - fraction_y) * (s01 - s00) + fraction_y * (s11 - s10);
  return {above + fraction_y * (below - above), left_to_right, below - above};
}

// ---- softmax ----------------------------------------------------------------------------------------------------

// The lowest finite number: what a maximum of logits starts from, so that -inf minus the maximum is -inf and never NaN.
template <typename T>
RK_HOST_DEVICE T lowest_logit() {
  return sizeof(T) == 8 ? T(-1.7976931348623157e308) : T(-3.4028234663852886e38f);
}

// p = softmax(logits); expected = sum_j p_j grad_p_j
template <typename T>
RK_HOST_DEVICE T softmax_adjoint(T p, T grad_p, T expected) {
  return p * (grad_p - expected);
}

}  // namespace rk::ms_deform_attn
