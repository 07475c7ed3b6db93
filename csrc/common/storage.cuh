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
using Access = typename AccessOf<COUNT * StorageOf<STORAGE>::BYTES>::type;  // COUNT values

template <DType STORAGE, int COUNT>
__device__ __forceinline__ void unpack(Access<STORAGE, COUNT> access, AccumulateOf<STORAGE> (&to)[COUNT]) {
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
__device__ __forceinline__ Access<STORAGE, COUNT> pack(const T (&from)[COUNT]) {
  Access<STORAGE, COUNT> access;
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

// data[at, at + COUNT), which must be aligned to that many values
template <DType STORAGE, int COUNT>
__device__ __forceinline__ void read_vector(const void* data, int64_t at, AccumulateOf<STORAGE> (&to)[COUNT]) {
  unpack<STORAGE, COUNT>(
      __ldg(
          reinterpret_cast<const Access<STORAGE, COUNT>*>(
              static_cast<const char*>(data) + at * StorageOf<STORAGE>::BYTES)),
      to);
}

template <DType STORAGE, int COUNT, typename T>
__device__ __forceinline__ void write_vector(void* data, int64_t at, const T (&from)[COUNT]) {
  __stcs(
      reinterpret_cast<Access<STORAGE, COUNT>*>(static_cast<char*>(data) + at * StorageOf<STORAGE>::BYTES),
      pack<STORAGE, COUNT>(from));
}

// Calls call(Storage) with a dtype that is known at run time only. A sum in float holds no float64.
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

// view[at, at + COUNT) and back, value by value
template <typename T, int COUNT>
__device__ __forceinline__ void read(const View& view, int64_t at, T (&to)[COUNT]) {
  with_storage<T>(view.dtype, [&](auto storage) {
    constexpr DType STORAGE = decltype(storage)::dtype;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      AccumulateOf<STORAGE> one[1];
      read_vector<STORAGE, 1>(view.data, at + i, one);
      to[i] = T(one[0]);
    }
  });
}

template <typename T, int COUNT>
__device__ __forceinline__ void write(const View& view, int64_t at, const T (&from)[COUNT]) {
  with_storage<T>(view.dtype, [&](auto storage) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const T one[1] = {from[i]};
      write_vector<decltype(storage)::dtype, 1>(view.data, at + i, one);
    }
  });
}

template <typename T>
__device__ __forceinline__ T read(const View& view, int64_t at) {
  T one[1];
  read(view, at, one);
  return one[0];
}

template <typename T>
__device__ __forceinline__ void write(const View& view, int64_t at, T value) {
  const T one[1] = {value};
  write(view, at, one);
}

// sums += values, in any order; the sum before is not asked for, so this is a reduction in the cache
__device__ __forceinline__ void add(double* sums, const double (&values)[1]) { atomicAdd(sums, values[0]); }
__device__ __forceinline__ void add(float* sums, const float (&values)[1]) { atomicAdd(sums, values[0]); }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void add(float* sums, const float (&values)[4]) {
  atomicAdd(reinterpret_cast<float4*>(sums), make_float4(values[0], values[1], values[2], values[3]));
}
#endif

}  // namespace rk
