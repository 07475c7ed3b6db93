#pragma once
// The block's dynamic shared memory as an array. Where no CUDA compiler reads this, an emulation provides it.

#if defined(__CUDACC__)
namespace rk {

template <typename T>
class SharedArray {
 public:
  __device__ __forceinline__ SharedArray() {
    extern __shared__ __align__(16) unsigned char bytes[];
    data = reinterpret_cast<T*>(bytes);
  }
  __device__ __forceinline__ T read(int index) const { return data[index]; }
  __device__ __forceinline__ void write(int index, T value) { data[index] = value; }

 private:
  T* data;
};

}  // namespace rk
#else
#include <shared_array_emulation.h>
#endif
