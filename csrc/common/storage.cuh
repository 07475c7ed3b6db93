#pragma once
// Values in global memory: of a storage type, read and written as the type they are accumulated in, several in one
// access where they are aligned. Inputs go through the read-only path (__ldg); results are written once (__stcs).

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "view.h"

namespace rk {

template <DType>
struct StorageOf {  // of the 16-bit types
  using Accumulate = float;
  static constexpr int BYTES = 2;
};
template <>
struct StorageOf<DType::float32> {
  using Accumulate = float;
  static constexpr int BYTES = 4;
};
template <>
struct StorageOf<DType::float64> {
  using Accumulate = double;
  static constexpr int BYTES = 8;
};

template <DType STORAGE>
using AccumulateOf = typename StorageOf<STORAGE>::Accumulate;

template <DType STORAGE>
constexpr int VECTOR_OF = 16 / StorageOf<STORAGE>::BYTES;  // values of one 16-byte access

template <int BYTES>
struct AccessOf;
template <>
struct AccessOf<2> {
  using type = unsigned short;
};
template <>
struct AccessOf<4> {
  using type = unsigned;
};
template <>
struct AccessOf<8> {
  using type = uint2;
};
template <>
struct AccessOf<16> {
  using type = uint4;
};

template <DType STORAGE, int COUNT>
__device__ __forceinline__ void unpack(
    typename AccessOf<COUNT * StorageOf<STORAGE>::BYTES>::type access, AccumulateOf<STORAGE> (&to)[COUNT]) {
  if constexpr (STORAGE == DType::float32 || STORAGE == DType::float64) {
    memcpy(to, &access, sizeof(access));
  } else if constexpr (COUNT == 1) {
    if constexpr (STORAGE == DType::float16) to[0] = __half2float(__ushort_as_half(access));
    else to[0] = __uint_as_float(unsigned(access) << 16);
  } else {
    unsigned words[COUNT / 2];
    memcpy(words, &access, sizeof(access));
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      if constexpr (STORAGE == DType::float16) {
        to[2 * i] = __half2float(__ushort_as_half((unsigned short)(words[i] & 0xffffu)));
        to[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(words[i] >> 16)));
      } else {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    }
  }
}

// Rounds to nearest.
template <DType STORAGE, typename T>
__device__ __forceinline__ unsigned short bits_of(T x) {
  if constexpr (STORAGE == DType::float16) return __half_as_ushort(__float2half_rn(float(x)));
  else return __bfloat16_as_ushort(__float2bfloat16_rn(float(x)));
}

template <DType STORAGE, int COUNT, typename T>
__device__ __forceinline__ typename AccessOf<COUNT * StorageOf<STORAGE>::BYTES>::type pack(const T (&from)[COUNT]) {
  typename AccessOf<COUNT * StorageOf<STORAGE>::BYTES>::type access;
  if constexpr (STORAGE == DType::float32 || STORAGE == DType::float64) {
    AccumulateOf<STORAGE> values[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = AccumulateOf<STORAGE>(from[i]);
    memcpy(&access, values, sizeof(access));
  } else if constexpr (COUNT == 1) {
    access = bits_of<STORAGE>(from[0]);
  } else {
    unsigned words[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i)
      words[i] = unsigned(bits_of<STORAGE>(from[2 * i])) | unsigned(bits_of<STORAGE>(from[2 * i + 1])) << 16;
    memcpy(&access, words, sizeof(access));
  }
  return access;
}

// to = data[at, at + COUNT); the access is COUNT values wide, which must be aligned to it.
template <DType STORAGE, int COUNT>
__device__ __forceinline__ void read_vector(const void* data, int64_t at, AccumulateOf<STORAGE> (&to)[COUNT]) {
  constexpr int BYTES = StorageOf<STORAGE>::BYTES;
  using Access = typename AccessOf<COUNT * BYTES>::type;
  const Access* from = reinterpret_cast<const Access*>(static_cast<const char*>(data) + at * BYTES);
  unpack<STORAGE, COUNT>(__ldg(from), to);
}

template <DType STORAGE, int COUNT, typename T>
__device__ __forceinline__ void write_vector(void* data, int64_t at, const T (&from)[COUNT]) {
  constexpr int BYTES = StorageOf<STORAGE>::BYTES;
  using Access = typename AccessOf<COUNT * BYTES>::type;
  __stcs(reinterpret_cast<Access*>(static_cast<char*>(data) + at * BYTES), pack<STORAGE, COUNT>(from));
}

// Calls call(std::integral_constant of the dtype), which is known at run time only. A value that is accumulated in T
// comes with others that T holds exactly, so float64 occurs with double alone.
template <DType STORAGE>
struct Storage {
  static constexpr DType dtype = STORAGE;
};
template <typename T, typename Call>
__device__ __forceinline__ void with_storage(DType dtype, Call call) {
  if (sizeof(T) == 8 && dtype == DType::float64) call(Storage<sizeof(T) == 8 ? DType::float64 : DType::float32>{});
  else if (dtype == DType::float32) call(Storage<DType::float32>{});
  else if (dtype == DType::float16) call(Storage<DType::float16>{});
  else call(Storage<DType::bfloat16>{});
}

template <typename T>
__device__ __forceinline__ T read(const View& view, int64_t at) {
  T value;
  with_storage<T>(view.dtype, [&](auto storage) {
    AccumulateOf<decltype(storage)::dtype> one[1];
    read_vector<decltype(storage)::dtype, 1>(view.data, at, one);
    value = T(one[0]);
  });
  return value;
}

template <typename T>
__device__ __forceinline__ void write(const View& view, int64_t at, T value) {
  const T one[1] = {value};
  with_storage<T>(view.dtype, [&](auto storage) { write_vector<decltype(storage)::dtype, 1>(view.data, at, one); });
}

// grad[at, at + COUNT) += value, in any order: without the previous value, so that it is a reduction in the cache
__device__ __forceinline__ void add(double* grad, const double (&value)[1]) { atomicAdd(grad, value[0]); }
__device__ __forceinline__ void add(float* grad, const float (&value)[1]) { atomicAdd(grad, value[0]); }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void add(float* grad, const float (&value)[4]) {
  atomicAdd(reinterpret_cast<float4*>(grad), make_float4(value[0], value[1], value[2], value[3]));
}
#endif

}  // namespace rk
