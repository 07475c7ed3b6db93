#pragma once
#include "../common/stable_tensor.h"

namespace rk::query_similarity {
void forward(const Tensor& x, const Tensor& output);
}  // namespace rk::query_similarity
