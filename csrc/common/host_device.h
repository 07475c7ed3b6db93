#pragma once
// One macro for scalar formulas that both host and device compile, and what a storage type is accumulated in.

#include <stdint.h>

#if defined(__CUDACC__)
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace rk {

enum class DType : int32_t { float64, float32, float16, bfloat16, boolean, int32, int64, none };

}  // namespace rk
