#pragma once
// A tensor as a kernel sees it: where it starts, what it stores, and its strides in elements. The last dimension is
// contiguous unless a kernel says otherwise.

#include <stdint.h>

namespace rk {

enum class DType : int32_t { float64, float32, float16, bfloat16, boolean, int32, int64, none };

struct View {
  void* data = nullptr;  // null: the argument was not given
  DType dtype = DType::none;
  int64_t stride[5] = {0, 0, 0, 0, 0};
};

}  // namespace rk
