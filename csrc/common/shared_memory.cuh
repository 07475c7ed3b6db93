#pragma once
// The block's dynamic shared memory, read and written at a byte. Where no CUDA compiler reads this, it is emulated.

#if defined(__CUDACC__)
namespace rk {

__device__ __forceinline__ unsigned char* shared_bytes() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

template <typename T>
__device__ __forceinline__ T read_shared(int at) {
  return *reinterpret_cast<const T*>(shared_bytes() + at);
}

template <typename T>
__device__ __forceinline__ void write_shared(int at, const T& value) {
  *reinterpret_cast<T*>(shared_bytes() + at) = value;
}

}  // namespace rk
#else
#include <shared_memory_emulation.h>
#endif
