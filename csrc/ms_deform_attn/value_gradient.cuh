#pragma once
// The gradient of value: grad_value += weight grad_output at the corners of every point, by reductions in the cache.
// The queries of a warp are neighbours, so at the coarser levels they often sample between the same pixels: what they
// add there is summed before it leaves the warp. Or, in place of sums, what a sum in a fixed order is made of.

#include "../common/shared_memory.cuh"
#include "points.cuh"

namespace rk::ms_deform_attn {

// A point in the form that all lanes of a warp read.
template <typename T>
struct alignas(16) SharedPoint {
  T weight[CORNERS];
  int64_t value_row, sum_row;  // of the first corner, in bytes

  SharedPoint() = default;
  __device__ __forceinline__ SharedPoint(const Corners<T>& corners, int64_t value_stride, int64_t sum_stride)
      : value_row(corners.position * value_stride), sum_row(corners.position * sum_stride) {
#pragma unroll
    for (int c = 0; c < CORNERS; ++c) weight[c] = corners.weight[c];
  }
};

#if defined(RK_ADDED)
constexpr int WIDEST_ADDED = RK_ADDED;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int WIDEST_ADDED = 4;
#else
constexpr int WIDEST_ADDED = 1;  // before sm_90 there is no reduction of float vectors
#endif

// Channels added by one reduction.
template <typename T, int VEC>
constexpr int ADDED = sizeof(T) == 8 || VEC < WIDEST_ADDED ? 1 : WIDEST_ADDED;

// The rows of the gradient of value of a batch element and head.
template <typename T>
struct SumRows {
  char* first;
  int64_t stride;  // in bytes

  __device__ __forceinline__ SumRows(const DeviceArgs& args, const Work& work) {
    const int64_t at = (work.b * args.S * args.H + work.h) * args.D;
    first = static_cast<char*>(args.grad_value_sums.data) + at * int64_t(sizeof(T));
    stride = args.H * args.D * int64_t(sizeof(T));
  }

  template <int COUNT>
  __device__ __forceinline__ void add(int64_t row, int64_t channel, const T (&values)[COUNT]) const {
    rk::add(reinterpret_cast<T*>(first + row) + channel, values);
  }
};

// ---- several queries a warp --------------------------------------------------------------------------------------

// The lanes of a warp share the corners and channels of one query after the other: a place is a corner and COUNT
// channels, and each lane has SLOTS of them. Where there are fewer places than lanes, SETS of lanes take OWN queries
// each. While the next query falls into the same cell, nothing is added but to the lane's sums.
template <DType STORAGE, int VEC, int LANES>
struct Adder {
  using T = AccumulateOf<STORAGE>;
  static constexpr int COUNT = ADDED<T, VEC>, UNITS = LANES * VEC / COUNT, PLACES = CORNERS * UNITS;
  static constexpr int SLOTS = PLACES < 32 ? 1 : PLACES / 32, SETS = PLACES < 32 ? 32 / PLACES : 1;
  static constexpr int OWN = 32 / LANES / SETS;

  T grad[OWN][SLOTS][COUNT];  // of output
  int lane, channels;

  static __device__ __forceinline__ int corner(int lane, int slot) { return (slot * 32 + lane) % PLACES / UNITS; }
  static __device__ __forceinline__ int channel(int lane, int slot) { return (slot * 32 + lane) % UNITS * COUNT; }

  __device__ __forceinline__ int first_query() const { return lane / PLACES * OWN; }

  __device__ __forceinline__ Adder(const DeviceArgs& args, const Work& work) : grad{} {
    lane = int(threadIdx.x) % 32, channels = int(args.D);
    const View& view = args.grad_output;
    const int64_t row = work.b * view.stride[0] + work.n * view.stride[1] + work.h * args.D;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int source = (first_query() + i) * LANES;
      const bool exists = __shfl_sync(ALL_LANES, int(work.exists), source) != 0;
      const int64_t of_query = __shfl_sync(ALL_LANES, (long long)(row), source);
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot)
        if (exists && channel(lane, slot) < channels)
          read_vector<STORAGE, COUNT>(view.data, of_query + channel(lane, slot), grad[i][slot]);
    }
  }

  // Adds the same point of the queries of the warp; `at`: the first of these, of `stride` bytes each.
  __device__ __forceinline__ void add(const SumRows<T>& rows, const Steps& steps, int at, int stride) const {
    at += first_query() * stride;
    int64_t row[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      row[i] = read_shared<int64_t>(at + i * stride + int(offsetof(SharedPoint<T>, sum_row)));
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int of_corner = corner(lane, slot);
      T sums[COUNT] = {};
      bool any = false;
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        const T weight = read_shared<T>(at + i * stride + of_corner * int(sizeof(T)));
        if (is_there(weight)) {
          any = true;
#pragma unroll
          for (int c = 0; c < COUNT; ++c) sums[c] += weight * grad[i][slot][c];
        }
        if (i + 1 < OWN && row[i + 1 < OWN ? i + 1 : i] == row[i]) continue;
        if (any && channel(lane, slot) < channels)
          rows.add(row[i] + to_corner(steps, of_corner), channel(lane, slot), sums);
        any = false;
#pragma unroll
        for (int c = 0; c < COUNT; ++c) sums[c] = 0;
      }
    }
  }
};

// ---- one query a warp --------------------------------------------------------------------------------------------

template <typename T, typename Added>
__device__ __forceinline__ void add_point(
    const SumRows<T>& rows, const Steps& steps, const SharedPoint<T>& point, const Added& added, int lane) {
#pragma unroll
  for (int c = 0; c < CORNERS; ++c) {
    if (!is_there(point.weight[c])) continue;
    added.for_vectors(lane, [&](int64_t channel, const auto& values, bool exists) {
      T part[sizeof(values) / sizeof(T)];
#pragma unroll
      for (int i = 0; i < int(sizeof(values) / sizeof(T)); ++i) part[i] = point.weight[c] * values[i];
      if (exists) rows.add(point.sum_row + to_corner(steps, c), channel, part);
    });
  }
}

// ---- a fixed order -----------------------------------------------------------------------------------------------

// The cell that a point falls into and what its corners weigh.
template <typename T>
__device__ __forceinline__ void write_cell(
    const DeviceArgs& args, const Work& work, int64_t at, int64_t first_cell, const Level<T>& level,
    const Cell<T>& cell, const Corners<T>& corners) {
  int64_t number = args.cells - 1;
  if (cell.inside) number = first_cell + int64_t(cell.row + 1) * (level.width + 1) + cell.column + 1;
  number += (work.b * args.H + work.h) * args.cells;
  if (args.cell.dtype == DType::int32) __stcs(static_cast<int*>(args.cell.data) + at, int(number));
  else __stcs(static_cast<long long*>(args.cell.data) + at, (long long)(number));
  T* to = static_cast<T*>(args.corner_weight.data) + CORNERS * at;
#pragma unroll
  for (int c = 0; c < CORNERS; ++c) __stcs(to + c, corners.weight[c]);
}

}  // namespace rk::ms_deform_attn
