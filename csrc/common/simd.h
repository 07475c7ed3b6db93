#pragma once
// Vectors of the SIMD level that this file is compiled for (GCC and Clang vector extensions, so one source serves
// SSE2, AVX2, AVX-512 and NEON). Everything is local to the translation unit and free of standard C++ headers: an
// inline function compiled for AVX-512 must never be the copy that the linker keeps for everybody.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "host_device.h"
#include "view.h"

#if defined(__AVX512F__)
#define RK_SIMD_BYTES 64
#elif defined(__AVX2__)
#define RK_SIMD_BYTES 32
#else
#define RK_SIMD_BYTES 16
#endif

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef RK_SIMD
#error "RK_SIMD names the namespace of the SIMD level: baseline, avx2 or avx512"
#endif

namespace rk {
namespace RK_SIMD {
namespace {

template <typename T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(RK_SIMD_BYTES)));
  typedef float unaligned __attribute__((vector_size(RK_SIMD_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(RK_SIMD_BYTES)));
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(RK_SIMD_BYTES)));
  typedef double unaligned __attribute__((vector_size(RK_SIMD_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(RK_SIMD_BYTES)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t LANES = RK_SIMD_BYTES / int64_t(sizeof(T));

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, so this folds to one broadcast
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

template <typename T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Whether a comparison holds in some lane.
template <typename T>
inline bool any(typename VectorOf<T>::bits comparison) {
  bool found = false;
  for (int64_t lane = 0; lane < LANES<T>; ++lane) found |= comparison[lane] != 0;
  return found;
}

// Lanes are added by halves, so the additions of a step are independent of each other.
template <typename T, int BYTES>
inline T sum_of_halves(const T* lanes) {
  if constexpr (BYTES == int(sizeof(T))) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(BYTES / 2), aligned(sizeof(T)), may_alias));
    const Half* halves = reinterpret_cast<const Half*>(lanes);
    const Half sum = halves[0] + halves[1];
    return sum_of_halves<T, BYTES / 2>(reinterpret_cast<const T*>(&sum));
  }
}

template <typename T>
inline T sum_of_lanes(Vec<T> v) {
  return sum_of_halves<T, RK_SIMD_BYTES>(reinterpret_cast<const T*>(&v));
}

template <typename T>
constexpr int64_t round_up_to_lanes(int64_t n) {
  return (n + LANES<T> - 1) / LANES<T> * LANES<T>;
}

// exp(x) for x <= 0 (and up to 80, for rounding): x log2(e) = n + f, |f| <= 1/2, exp(x) = 2^n 2^f.
// Adding 1.5 * 2^23 + 127 rounds to an integer whose low bits are the exponent field of 2^n.
// Below the smallest normal number the result is 0; NaN stays NaN. The error is about (1 + |x|) 2^-24, relative: less
// than rounding in a sum of such terms, of which the largest is 1.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  using Bits = VectorOf<float>::bits;
  const float shifter = 12583039.0f, log2e = 1.44269504088896341f;
  const Vec<float> shifted = x * log2e + shifter;
  const Vec<float> n = shifted - shifter;
  const Vec<float> f = x * log2e - n;
  Vec<float> p = broadcast(1.535336188319500e-4f);  // Cephes exp2f
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return x < -87.33f ? Vec<float>{} : p * (Vec<float>)((Bits)shifted << 23);
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  using Bits = VectorOf<double>::bits;
  const double shifter = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52 and the bias of the exponent
  const Vec<double> shifted = x * 1.4426950408889634074 + shifter;
  const Vec<double> n = shifted - shifter;
  const Vec<double> r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  Vec<double> p = broadcast(1.0 / 6227020800.0);  // Taylor: |r|^14 / 14! < 5e-18
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return x < -708.0 ? Vec<double>{} : p * (Vec<double>)((Bits)shifted << 52);
}

// 2^x for x <= 0 (and up to 100): for who has log2(e) in a factor of x already. x = n + f, 2^x = 2^n 2^f, p(0) = 1.
// Below the smallest normal number the result is 0: products of subnormal numbers are a hundred times slower. NaN stays
// NaN. The error is below 2^-22.5, relative.
inline Vec<float> exp2_nonpositive(Vec<float> x) {
#if defined(__AVX512DQ__)
  const Vec<float> f = _mm512_reduce_ps(x, 0);  // x - round(x)
#else
  using Bits = VectorOf<float>::bits;
  const float shifter = 12583039.0f;  // as in exp_nonpositive
  const Vec<float> shifted = x + shifter;
  const Vec<float> f = x - (shifted - shifter);
#endif
  Vec<float> p = broadcast(1.326472725e-3f);  // minimax of the relative error with p(0) = 1: 9e-8
  p = p * f + 9.671512688e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  const __mmask16 normal = _mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, x - f);
#else
  return x < -126.0f ? Vec<float>{} : p * (Vec<float>)((Bits)shifted << 23);
#endif
}

inline Vec<double> exp2_nonpositive(Vec<double> x) { return exp_nonpositive(x * 0.69314718055994530942); }

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// 1 / x for normal numbers: AVX-512 divides 16 floats in 10 cycles, its estimate and a step of Newton take a third.
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> estimate = _mm512_rcp14_ps(x);
  return estimate + estimate * (1 - x * estimate);
#else
  return 1 / x;
#endif
}

inline Vec<double> reciprocal(Vec<double> x) { return 1 / x; }

// ---- storage types -------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return from_bits(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));        // inf, NaN
  if (magnitude < 0x400u) return from_bits(sign | to_bits(float(magnitude) * 5.9604644775390625e-8f));  // 2^-24
  return from_bits(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

// Round to nearest, ties to even.
inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return {uint16_t((bits >> 16) | 0x40u)};
  return {uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

inline Half to_half(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {uint16_t(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: let the adder round to a multiple of 2^-24
    const float rounded = from_bits(magnitude) + 0.5f;
    return {uint16_t(sign | (to_bits(rounded) - 0x3F000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13))};
#endif
}

template <typename T, typename Storage>
inline T load_as(Storage x) {
  return T(x);
}
template <>
inline float load_as<float, BFloat16>(BFloat16 x) {
  return to_float(x);
}
template <>
inline float load_as<float, Half>(Half x) {
  return to_float(x);
}
template <>
inline double load_as<double, BFloat16>(BFloat16 x) {
  return to_float(x);
}
template <>
inline double load_as<double, Half>(Half x) {
  return to_float(x);
}

template <typename Storage, typename T>
inline Storage store_as(T x) {
  return Storage(x);
}
template <>
inline BFloat16 store_as<BFloat16, float>(float x) {
  return to_bfloat16(x);
}
template <>
inline Half store_as<Half, float>(float x) {
  return to_half(x);
}
template <>
inline BFloat16 store_as<BFloat16, double>(double x) {
  return to_bfloat16(float(x));
}
template <>
inline Half store_as<Half, double>(double x) {
  return to_half(float(x));
}

// A vector of T from as many stored values.
template <typename T>
inline RK_INLINE Vec<T> load_vector(const T* from) {
  return load(from);
}

template <typename T>
inline RK_INLINE Vec<T> load_vector(const BFloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(RK_SIMD_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(RK_SIMD_BYTES)));
  Narrow narrow;
  memcpy(&narrow, from, sizeof(narrow));
  return (Vec<T>)(__builtin_convertvector(narrow, Wide) << 16);
}

template <typename T>
inline RK_INLINE Vec<T> load_vector(const Half* from) {
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

// The dtype of values that are accumulated in T and stored as they are.
template <typename T>
constexpr DType DTYPE_OF = sizeof(T) == 8 ? DType::float64 : DType::float32;

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Calls `call(Storage{})` with the C++ type of a floating dtype that is accumulated in T.
template <typename T, typename Call>
inline void with_storage_of(DType dtype, Call call) {
  if constexpr (sizeof(T) == 8) return call(double{});
  else switch (dtype) {
      case DType::float32: return call(float{});
      case DType::float16: return call(Half{});
      case DType::bfloat16: return call(BFloat16{});
      default: return;
    }
}

// The same with any floating dtype.
template <typename Call>
inline void with_storage(DType dtype, Call call) {
  dtype == DType::float64 ? with_storage_of<double>(dtype, call) : with_storage_of<float>(dtype, call);
}

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
