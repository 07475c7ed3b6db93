#pragma once
// y = weight x^ + bias, x^ = (s - mean s) rstd, and their adjoint; T is a number or a vector of them.

#include "../common/host_device.h"

namespace rk::add_layer_norm {

template <typename T>
RK_HOST_DEVICE T scaled_and_shifted(T x_hat, T weight, T bias) {
  return x_hat * weight + bias;
}

// The inverse; inverse_weight is NaN where rounding of y has left nothing of x^ (|weight| <= unit roundoff |bias|).
template <typename T>
RK_HOST_DEVICE T normalized_of(T y, T inverse_weight, T bias) {
  return (y - bias) * inverse_weight;
}

// g = weight dy: ds = rstd (g - mean g - x^ mean(g x^)).
template <typename T>
RK_HOST_DEVICE T sum_adjoint(T g, T x_hat, T mean_g, T mean_g_x_hat, T rstd) {
  return (g - mean_g - x_hat * mean_g_x_hat) * rstd;
}

}  // namespace rk::add_layer_norm
