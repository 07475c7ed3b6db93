#pragma once
// The routing bias of Route-DETR (arXiv 2512.13876) for one pair (i, j), forward beside adjoint. T is a scalar on a
// device and a vector of pairs on a CPU: both have the same operators.
//
//     p = sigmoid(gate),  r = p sup + (1 - p) del,  b = clamp(r, -limit, limit)

#include "../common/host_device.h"

namespace rk::routed_attention {

// sigmoid(gate), with decay = exp(-|gate|) and inverse = 1 / (1 + decay): no overflow for any gate.
template <typename T>
RK_HOST_DEVICE T sigmoid_of_decay(T gate, T decay, T inverse) {
  return gate < 0 ? decay * inverse : inverse;
}

template <typename T>
RK_HOST_DEVICE T route(T p, T sup, T del) {
  return p * sup + (1 - p) * del;
}

template <typename T>
RK_HOST_DEVICE T clamp(T r, T limit) {
  const T below = r > limit ? limit : r;  // a NaN stays one
  return below < -limit ? -limit : below;
}

// The gradient that reaches r through the clamp.
template <typename T>
RK_HOST_DEVICE T clamp_adjoint(T r, T limit, T grad_bias) {
  const T magnitude = r < 0 ? -r : r;
  return magnitude > limit ? grad_bias - grad_bias : grad_bias;
}

template <typename T>
struct RouteGradient {
  T sup, del, gate;
};

// dsup = dr p,  ddel = dr (1 - p),  dgate = dr p (1 - p)(sup - del)
template <typename T>
RK_HOST_DEVICE RouteGradient<T> route_adjoint(T p, T sup_minus_del, T grad_r) {
  const T to_sup = grad_r * p, to_del = grad_r - to_sup;
  return {to_sup, to_del, to_del * p * sup_minus_del};
}

}  // namespace rk::routed_attention
