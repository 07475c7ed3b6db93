#pragma once
// x^ = x / max(|x|, eps): the factor of x, from its squared norm.

#include "../common/host_device.h"

namespace rk::query_similarity {

template <typename T>
RK_HOST_DEVICE T inverse_norm(T squared_norm, T (*square_root)(T)) {
  const T norm = square_root(squared_norm), eps = T(1e-12);
  return 1 / (norm > eps ? norm : eps);
}

}  // namespace rk::query_similarity
