#pragma once
// Rows between a tensor's storage type and the accumulate type T, and blocks of one scratch allocation.

#include "simd.h"
#include "view.h"

namespace rk {
namespace RK_SIMD {
namespace {

// to[0, n) = factor * row, zeros in [n, padded).
template <typename T>
inline void read_row(T* to, int64_t n, int64_t padded, DType dtype, const void* data, int64_t offset, T factor) {
  with_storage(dtype, [&](auto type) {
    using Storage = decltype(type);
    const Storage* from = static_cast<const Storage*>(data) + offset;
    for (int64_t i = 0; i < n; ++i) to[i] = factor * load_as<T>(from[i]);
  });
  for (int64_t i = n; i < padded; ++i) to[i] = 0;
}

// row = factor * from[0, n), rounded once.
template <typename T>
inline void write_row(const T* from, int64_t n, DType dtype, void* data, int64_t offset, T factor) {
  with_storage(dtype, [&](auto type) {
    using Storage = decltype(type);
    Storage* to = static_cast<Storage*>(data) + offset;
    for (int64_t i = 0; i < n; ++i) to[i] = store_as<Storage>(factor * from[i]);
  });
}

// to[i, 0..padded) = row i of `rows` rows `stride` apart, zeros in [n, padded).
template <typename T>
inline void read_rows(
    T* to, int64_t rows, int64_t n, int64_t padded, DType dtype, const void* data, int64_t offset, int64_t stride) {
  const bool whole_vectors = dtype == DTYPE_OF<T> && n == padded;
  for (int64_t i = 0; i < rows; ++i) {
    if (whole_vectors) {
      const T* from = static_cast<const T*>(data) + offset + i * stride;
      for (int64_t c = 0; c < n; c += LANES<T>) store(to + i * padded + c, load(from + c));
    } else {
      read_row<T>(to + i * padded, n, padded, dtype, data, offset + i * stride, T(1));
    }
  }
}

// to[d * to_row + j] = from[j][d]: columns become rows.
template <typename T>
inline void transpose(const T* from, int64_t from_row, int64_t rows, int64_t n, T* to, int64_t to_row) {
  int64_t j = 0;
  for (; j + LANES<T> <= rows; j += LANES<T>)
    for (int64_t d = 0; d < n; ++d) {
      Vec<T> column;
      for (int64_t lane = 0; lane < LANES<T>; ++lane) column[lane] = from[(j + lane) * from_row + d];
      store(to + d * to_row + j, column);
    }
  for (; j < rows; ++j) {
    const T* row = from + j * from_row;
    for (int64_t d = 0; d < n; ++d) to[d * to_row + j] = row[d];
  }
}

constexpr int64_t ALIGNMENT = 64;

// Hands out 64-byte aligned blocks of one allocation; with a null base it only counts.
struct Blocks {
  char* base;
  int64_t used = 0;

  explicit Blocks(char* start) : base(start) {
    if (base != nullptr) used = (ALIGNMENT - int64_t(reinterpret_cast<uintptr_t>(base) % ALIGNMENT)) % ALIGNMENT;
  }

  template <typename T>
  T* take(int64_t count) {
    T* block = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return block;
  }
};

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
