#pragma once
#include "../common/stable_tensor.h"

namespace rk { void query_similarity_relu(Tensor x, Tensor output); }  // namespace rk
