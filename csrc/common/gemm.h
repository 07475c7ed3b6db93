#pragma once
// The one matrix product that the attention kernels are made of: a register block of rows by 2 vectors, handed on while
// it is in registers, so that what follows a product (bias, exp, a maximum) costs no trip through memory.

#include "simd.h"

#if defined(__clang__)
#define RK_UNROLL(times) _Pragma("clang loop unroll(full)")
#define RK_UNROLL_PARTLY _Pragma("clang loop unroll_count(4)")
#else
#define RK_UNROLL_PRAGMA(text) _Pragma(#text)
#define RK_UNROLL(times) RK_UNROLL_PRAGMA(GCC unroll times)
#define RK_UNROLL_PARTLY _Pragma("GCC unroll 4")
#endif

namespace rk {
namespace RK_SIMD {
namespace {

#if RK_SIMD_BYTES == 64
constexpr int ACCUMULATORS = 16;  // of 32 registers; two FMAs of latency 4 need 8
#else
constexpr int ACCUMULATORS = 8;  // of 16 registers
#endif

// Element (i, j) lies at data[i * row + j * column]. Rows of B are contiguous: its column is not read.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column = 1;
};

template <typename T>
inline Matrix<T> transposed(const Matrix<T>& a) {
  return {a.data, a.column, a.row};
}

template <int ROWS, int VECTORS, typename T, typename Start, typename Finish>
inline RK_INLINE void gemm_block(
    int64_t row, int64_t column, int64_t k, const Matrix<T>& a, const Matrix<T>& b, const Start& start,
    const Finish& finish) {
  Vec<T> sum[ROWS][VECTORS];
  RK_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) {
    RK_UNROLL(2)
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = start(row + r, column + v * LANES<T>);
  }
  RK_UNROLL_PARTLY
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> row_of_b[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row_of_b[v] = load(b.data + p * b.row + column + v * LANES<T>);
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> factor = broadcast(a.data[(row + r) * a.row + p * a.column]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * row_of_b[v];
    }
  }
  RK_UNROLL(16)
  for (int r = 0; r < ROWS; ++r) {
    RK_UNROLL(2)
    for (int v = 0; v < VECTORS; ++v) finish(row + r, column + v * LANES<T>, sum[r][v]);
  }
}

// Rows [row, m) in blocks of ROWS, what is left in smaller blocks.
template <int ROWS, int VECTORS, typename T, typename Start, typename Finish>
inline RK_INLINE void gemm_rows(
    int64_t row, int64_t m, int64_t column, int64_t k, const Matrix<T>& a, const Matrix<T>& b, const Start& start,
    const Finish& finish) {
  for (; row + ROWS <= m; row += ROWS) gemm_block<ROWS, VECTORS>(row, column, k, a, b, start, finish);
  if constexpr (ROWS > 1)
    if (row < m) gemm_rows<(ROWS > 4 ? 4 : 1), VECTORS>(row, m, column, k, a, b, start, finish);
}

// Calls finish(row, column, sum) once for every vector of A B + start(row, column), which costs no addition; sum holds
// columns [column, column + LANES<T>) of row. A [m, k] with any strides; B [k, n] with contiguous rows; n a multiple of
// LANES<T>. All rows of A meet one panel of B, [k, 2 vectors], while it is in the first-level cache.
template <typename T, typename Start, typename Finish>
inline RK_INLINE void gemm(
    int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, const Start& start, const Finish& finish) {
  int64_t column = 0;
  for (; column + 2 * LANES<T> <= n; column += 2 * LANES<T>)
    gemm_rows<ACCUMULATORS / 2, 2>(0, m, column, k, a, b, start, finish);
  if (column < n) gemm_rows<ACCUMULATORS, 1>(0, m, column, k, a, b, start, finish);
}

template <typename T, typename Finish>
inline RK_INLINE void gemm(
    int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, const Finish& finish) {
  gemm<T>(m, n, k, a, b, [](int64_t, int64_t) RK_INLINE { return Vec<T>{}; }, finish);
}

// C = A B
template <typename T>
__attribute__((noinline)) void multiply(
    int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, T* c, int64_t c_row) {
  gemm<T>(
      m, n, k, a, b, [=](int64_t row, int64_t column, Vec<T> sum) RK_INLINE { store(c + row * c_row + column, sum); });
}

// C += A B; the product is summed by itself and C is added last, so that errors do not pile up.
template <typename T>
__attribute__((noinline)) void multiply_add(
    int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, T* c, int64_t c_row) {
  gemm<T>(m, n, k, a, b, [=](int64_t row, int64_t column, Vec<T> sum) RK_INLINE {
    T* to = c + row * c_row + column;
    store(to, load(to) + sum);
  });
}

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
