#pragma once
// A vector of T from as many values of a storage type.

#include "../common/simd.h"

namespace rk {
namespace RK_SIMD {
namespace {

template <typename T>
inline __attribute__((always_inline)) Vec<T> load_vector(const T* from) {
  return load(from);
}

template <typename T>
inline __attribute__((always_inline)) Vec<T> load_vector(const BFloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(RK_SIMD_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(RK_SIMD_BYTES)));
  Narrow narrow;
  memcpy(&narrow, from, sizeof(narrow));
  return (Vec<T>)(__builtin_convertvector(narrow, Wide) << 16);
}

template <typename T>
inline __attribute__((always_inline)) Vec<T> load_vector(const Half* from) {
#if defined(__AVX512F__)
  return (Vec<T>)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vec<T>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<T> wide = {};
  for (int64_t lane = 0; lane < LANES<T>; ++lane) wide[lane] = to_float(from[lane]);
  return wide;
#endif
}

// Calls call(Storage{}) with the type of values that are accumulated in T.
template <typename Call>
inline void with_storage_of(float, DType dtype, Call call) {
  switch (dtype) {
    case DType::float32: return call(float{});
    case DType::float16: return call(Half{});
    case DType::bfloat16: return call(BFloat16{});
    default: return;
  }
}
template <typename Call>
inline void with_storage_of(double, DType, Call call) {
  call(double{});
}

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
