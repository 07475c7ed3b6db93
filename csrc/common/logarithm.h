#pragma once
// log(1 + e) for who has an exponential e at hand. T is a number type, V a T or a vector of them.

#include "host_device.h"

namespace rk {

// log(1 + e) of e in [0, 1]: 2 artanh(s) = 2 sum_i s^(2i + 1) / (2i + 1), s = e / (2 + e) <= 1/3; 9^-8 / 17 < 2^-29,
// 9^-18 / 37 < 2^-62.
template <typename T, typename V>
RK_HOST_DEVICE V log_one_plus(V e) {
  constexpr int LAST = sizeof(T) == 8 ? 17 : 7;
  const V s = e / (e + T(2)), square = s * s;
  V sum = V{} + T(1) / T(2 * LAST + 1);
#pragma GCC unroll 17
  for (int i = LAST - 1; i >= 0; --i) sum = sum * square + T(1) / T(2 * i + 1);
  return s * sum * T(2);
}

}  // namespace rk
