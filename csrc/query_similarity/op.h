#pragma once
#include "../common/stable_tensor.h"

namespace rk::query_similarity { void forward(Tensor x, Tensor output); }  // namespace rk::query_similarity
