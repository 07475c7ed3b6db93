#pragma once
// The one matrix product that the attention kernels are made of: a register block of 8 rows by 2 vectors.

#include "simd.h"

namespace rk {
namespace RK_SIMD {
namespace {

#if RK_SIMD_BYTES == 64
constexpr int GEMM_ROWS = 8;  // 16 accumulators of 32 registers; two FMAs of latency 4 need 8
#else
constexpr int GEMM_ROWS = 4;  // 8 accumulators of 16 registers
#endif

template <typename T, bool ACCUMULATE, int ROWS, int VECTORS>
inline __attribute__((always_inline)) void gemm_block(
    int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* c, int64_t c_row) {
  Vec<T> sum[ROWS][VECTORS] = {};  // of this product alone: what C holds is added last, so errors do not pile up
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> row_of_b[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row_of_b[v] = load(b + p * b_row + v * LANES<T>);
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> factor = broadcast(a[r * a_row + p * a_column]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * row_of_b[v];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      T* to = c + r * c_row + v * LANES<T>;
      store(to, ACCUMULATE ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <typename T, bool ACCUMULATE, int VECTORS>
inline __attribute__((always_inline)) void gemm_columns(
    int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* c, int64_t c_row) {
  int64_t row = 0;
  for (; row + GEMM_ROWS <= m; row += GEMM_ROWS)
    gemm_block<T, ACCUMULATE, GEMM_ROWS, VECTORS>(
        k, a + row * a_row, a_row, a_column, b, b_row, c + row * c_row, c_row);
  for (; row < m; ++row)
    gemm_block<T, ACCUMULATE, 1, VECTORS>(k, a + row * a_row, a_row, a_column, b, b_row, c + row * c_row, c_row);
}

// C (+)= A B. A [m, k] with any strides; B [k, n] and C [m, n] with contiguous rows; n a multiple of LANES<T>.
// All rows of A meet one panel of B, [k, 2 vectors], while it is in the first-level cache.
template <typename T, bool ACCUMULATE>
__attribute__((noinline)) void gemm(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* c,
    int64_t c_row) {
  int64_t column = 0;
  for (; column + 2 * LANES<T> <= n; column += 2 * LANES<T>)
    gemm_columns<T, ACCUMULATE, 2>(m, k, a, a_row, a_column, b + column, b_row, c + column, c_row);
  if (column < n) gemm_columns<T, ACCUMULATE, 1>(m, k, a, a_row, a_column, b + column, b_row, c + column, c_row);
}

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
