#pragma once
// Costs of a prediction for a target. T is a number type, V a T or a vector of them.
//
//     focal    alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)),   p = sigmoid(x)
//     softmax  -exp(x - lse)
//     cost     w_class class cost + w_l1 |p - t|_1 - w_giou giou(p, t)

#include "../common/boxes.h"
#include "../common/logarithm.h"

namespace rk::matching_cost {

// With e = exp(-|x|) exact to rounding at either end: -log p = max(-x, 0) + log(1 + e), -log(1 - p) = max(x, 0) +
// log(1 + e). `exponential` takes numbers that are not positive.
template <typename T, typename V, typename Exp>
RK_HOST_DEVICE V focal_cost(V x, T alpha, T gamma, Exp exponential) {
  const V zero{};
  const V e = exponential(x > zero ? -x : x), log_e = log_one_plus<T, V>(e);
  const V minus_log_p = (x > zero ? zero : -x) + log_e, minus_log_rest = (x > zero ? x : zero) + log_e;
  const V larger = T(1) / (e + T(1)), smaller = e * larger;
  const V p = x > zero ? larger : smaller, rest = x > zero ? smaller : larger;
  const bool squares = gamma == T(2);
  const V if_positive = squares ? rest * rest : exponential(minus_log_rest * -gamma);
  const V if_negative = squares ? p * p : exponential(minus_log_p * -gamma);
  return if_positive * minus_log_p * alpha - if_negative * minus_log_rest * (T(1) - alpha);
}

// A cost that is not finite is -inf: the cheapest of all, so that nobody overlooks it.
template <typename T, typename V>
RK_HOST_DEVICE V marked(V cost) {
  const V zero{};
  return cost - cost == zero ? cost : V{} - T(__builtin_inf());
}

}  // namespace rk::matching_cost
