#pragma once
// z is -logit of the target's class and logit of every other; q = sigmoid(z) = 1 - p_t.
//
//     loss = q^gamma softplus(z),   d loss / d z = q^gamma (gamma (1 - q) softplus(z) + q)
//
// both times alpha_t. With e = exp(-|z|) all of it is exact to rounding at either end:
// softplus(z) = max(z, 0) + log(1 + e), log q = -softplus(-z).
// T is a number type, V a T or a vector of them.

#include "../common/host_device.h"
#include "../common/logarithm.h"

namespace rk::sigmoid_focal_loss {

template <typename V>
struct FocalTerms {
  V loss, grad;  // without alpha_t; grad by z
};

// `exponential` takes numbers that are not positive.
template <typename T, typename V, typename Exp>
RK_HOST_DEVICE FocalTerms<V> focal_terms(V z, T gamma, Exp exponential) {
  const V zero{};
  const V e = exponential(z > zero ? -z : z), log_e = log_one_plus<T, V>(e);
  const V softplus = (z > zero ? z : zero) + log_e, minus_log_q = (z > zero ? zero : -z) + log_e;
  const V larger = T(1) / (e + T(1)), smaller = e * larger;
  const V q = z > zero ? larger : smaller, p_t = z > zero ? smaller : larger;
  const V power = gamma == T(2) ? q * q : exponential(minus_log_q * -gamma);
  return {power * softplus, power * (p_t * softplus * gamma + q)};
}

}  // namespace rk::sigmoid_focal_loss
