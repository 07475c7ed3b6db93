#pragma once
// Sums over the lanes of vectors, many at once: halving by shuffles, LANES vectors to one vector of their sums.

#include "../common/simd.h"

namespace rk::ms_deform_attn::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

template <int... I>
struct Lanes {};
template <int COUNT, int... I>
struct LanesUpTo : LanesUpTo<COUNT - 1, COUNT - 1, I...> {};
template <int... I>
struct LanesUpTo<0, I...> {
  using type = Lanes<I...>;
};
template <typename T>
using AllLanes = typename LanesUpTo<int(LANES<T>)>::type;

#if defined(__clang__) || __GNUC__ >= 12
#define RK_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RK_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, typename VectorOf<T>::bits{__VA_ARGS__})
#endif

// Lane i is a_i + a_(i + STEP) where bit STEP of i is clear, and b_(i - STEP) + b_i where it is set.
template <typename T, int STEP, int... I>
inline RK_INLINE Vec<T> halve_two(Vec<T> a, Vec<T> b, Lanes<I...>) {
  constexpr int n = int(LANES<T>);
  return RK_SHUFFLE(T, a, b, (I & STEP ? n + I - STEP : I)...) + RK_SHUFFLE(T, a, b, (I & STEP ? n + I : I + STEP)...);
}

template <typename T, int STEP>
struct HalveAll {
  // 2 STEP vectors to one; the vectors are `stride` values apart.
  static inline RK_INLINE Vec<T> sums(const T* vectors, int64_t stride) {
    const Vec<T> a = HalveAll<T, STEP / 2>::sums(vectors, stride);
    const Vec<T> b = HalveAll<T, STEP / 2>::sums(vectors + STEP * stride, stride);
    return halve_two<T, STEP>(a, b, AllLanes<T>{});
  }
};
template <typename T>
struct HalveAll<T, 0> {
  static inline RK_INLINE Vec<T> sums(const T* vectors, int64_t) { return load(vectors); }
};

// Lane i of the result is the sum of the lanes of the i-th vector.
template <typename T>
inline RK_INLINE Vec<T> sums_of_vectors(const T* vectors /* [LANES, LANES] */) {
  return HalveAll<T, int(LANES<T> / 2)>::sums(vectors, LANES<T>);
}

template <typename T, int STEP, int... I>
inline RK_INLINE Vec<T> exchanged(Vec<T> a, Lanes<I...>) {
  return RK_SHUFFLE(T, a, a, (I ^ STEP)...);
}

template <typename T, int STEP>
struct Fold {
  static inline RK_INLINE Vec<T> sum(Vec<T> a) {
    return Fold<T, STEP / 2>::sum(a + exchanged<T, STEP>(a, AllLanes<T>{}));
  }
  static inline RK_INLINE Vec<T> maximum(Vec<T> a) {
    return Fold<T, STEP / 2>::maximum(max<T>(a, exchanged<T, STEP>(a, AllLanes<T>{})));
  }
};
template <typename T>
struct Fold<T, 0> {
  static inline RK_INLINE Vec<T> sum(Vec<T> a) { return a; }
  static inline RK_INLINE Vec<T> maximum(Vec<T> a) { return a; }
};

// Every lane of the result is the sum (the maximum) of all lanes.
template <typename T>
inline RK_INLINE Vec<T> sum_in_every_lane(Vec<T> a) {
  return Fold<T, int(LANES<T> / 2)>::sum(a);
}
template <typename T>
inline RK_INLINE Vec<T> maximum_in_every_lane(Vec<T> a) {
  return Fold<T, int(LANES<T> / 2)>::maximum(a);
}

}  // namespace
}  // namespace rk::ms_deform_attn::RK_SIMD
