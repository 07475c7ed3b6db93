#pragma once
// The points of one query and head, which a group of LANES lanes works on. Each point is located by one lane, which
// tells the others by shuffles where the corners are and what they weigh.

#include <math.h>
#include <stddef.h>

#include <type_traits>

#include "../common/storage.cuh"
#include "math.h"
#include "work_order.cuh"

namespace rk::ms_deform_attn {

constexpr int THREADS = 256;  // of a block, at most
constexpr unsigned ALL_LANES = 0xffffffffu;

template <int LANES, typename T>
__device__ __forceinline__ T sum_over_lanes(T x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

// ---- weights -----------------------------------------------------------------------------------------------------

// The weight of a point is exp(logit - largest) factor; without a softmax it is what memory holds. Where every logit is
// -inf every weight is 0: `largest` starts above -inf, and a sum below 1 is 0.
template <typename T>
struct Softmax {
  T largest, factor;
};

__device__ __forceinline__ int64_t row_of_points(const View& view, const Work& work) {
  return work.b * view.stride[0] + work.n * view.stride[1] + work.h * view.stride[2];
}

template <int LANES, typename T>
__device__ __forceinline__ Softmax<T> softmax_of(const DeviceArgs& args, const Work& work, int lane) {
  Softmax<T> softmax = {T(0), T(1)};
  if (!args.fused) return softmax;
  const int64_t row = row_of_points(args.weights, work), points = work.exists ? args.K : 0;
  T largest = lowest_logit<T>(), sum = 0;
  for (int64_t k = lane; k < points; k += LANES) {
    const T logit = read<T>(args.weights, row + k);
    largest = logit > largest ? logit : largest;
  }
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(ALL_LANES, largest, distance);
    largest = other > largest ? other : largest;
  }
  for (int64_t k = lane; k < points; k += LANES) sum += exp(read<T>(args.weights, row + k) - largest);
  sum = sum_over_lanes<LANES>(sum);
  return {largest, T(1) / (sum < T(1) ? T(1) : sum)};
}

template <typename T>
__device__ __forceinline__ T weight_of(const DeviceArgs& args, const Softmax<T>& softmax, int64_t at) {
  const T stored = read<T>(args.weights, at);
  return args.fused ? exp(stored - softmax.largest) * softmax.factor : stored;
}

// ---- locations ---------------------------------------------------------------------------------------------------

template <typename T>
struct Level {
  int64_t start;
  int32_t height, width, first_point, points;
  T x, y, extent_x, extent_y;  // the query's reference point or box
  T half_step;                 // 0.5 / P, of boxes
};

template <typename T>
__device__ __forceinline__ Level<T> level_of(const DeviceArgs& args, const Work& work, int32_t l) {
  const DeviceLevel& stored = args.levels[l];
  Level<T> level = {stored.start, stored.height, stored.width, stored.first_point, stored.points};
  if (!args.fused || !work.exists || stored.points == 0) return level;
  const View& reference = args.reference;
  const int64_t row = args.reference_levels == 1 ? 0 : l;
  const int64_t at = work.b * reference.stride[0] + work.n * reference.stride[1] + row * reference.stride[2];
  T pair[2];
  read(reference, at, pair);
  level.x = pair[0], level.y = pair[1];
  if (args.reference_size == 4) {
    read(reference, at + 2, pair);
    level.extent_x = pair[0], level.extent_y = pair[1];
    level.half_step = T(0.5) / T(stored.points);
  }
  return level;
}

// A point in the form that the lane which located it knows.
template <typename T>
struct Point {
  bool exists;
  T weight, x, y;  // location or offset
  Cell<T> cell;
};

template <typename T>
__device__ __forceinline__ Point<T> point_of(
    const DeviceArgs& args, const Work& work, const Softmax<T>& softmax, const Level<T>& level, int32_t of_level) {
  Point<T> point = {};
  point.exists = work.exists && of_level < level.points;
  if (!point.exists) return point;
  const int32_t k = level.first_point + of_level;
  T place[2];
  read(args.places, row_of_points(args.places, work) + 2 * k, place);
  point.x = place[0], point.y = place[1];
  point.weight = weight_of(args, softmax, row_of_points(args.weights, work) + k);
  const T width = T(level.width), height = T(level.height);
  T x, y;
  if (!args.fused) {
    x = pixel_of_location(point.x, width);
    y = pixel_of_location(point.y, height);
  } else if (args.reference_size == 2) {
    x = pixel_of_point(level.x, point.x, width);
    y = pixel_of_point(level.y, point.y, height);
  } else {
    x = pixel_of_box(level.x, level.extent_x, point.x, level.half_step, width);
    y = pixel_of_box(level.y, level.extent_y, point.y, level.half_step, height);
  }
  point.cell = cell_of(x, y, level.height, level.width);
  return point;
}

// ---- corners -----------------------------------------------------------------------------------------------------

constexpr int CORNERS = 4;  // (row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)

// A corner that does not exist weighs -0, which no corner that exists does: one register tells both, and what is not
// there is neither read nor multiplied by a NaN.
template <typename T>
struct Corners {
  int64_t position;  // of the first corner, whether it exists or not
  T weight[CORNERS];
};

__device__ __forceinline__ bool is_there(float weight) { return __float_as_uint(weight) != 0x80000000u; }
__device__ __forceinline__ bool is_there(double weight) {
  return __double_as_longlong(weight) != (long long)(0x8000000000000000ull);
}

template <typename T>
__device__ __forceinline__ Corners<T> corners_of(
    const DeviceArgs& args, const Work& work, const Level<T>& level, const Point<T>& point) {
  const Cell<T>& cell = point.cell;
  const CornerWeights<T> share = corner_weights(cell.fraction_x, cell.fraction_y, point.weight);
  const int64_t position = level.start + int64_t(cell.row) * level.width + cell.column;
  Corners<T> corners = {
      position,  // - 0 + 0 is + 0
      {cell.top && cell.left ? share.top_left + T(0) : -T(0), cell.top && cell.right ? share.top_right + T(0) : -T(0),
       cell.bottom && cell.left ? share.bottom_left + T(0) : -T(0),
       cell.bottom && cell.right ? share.bottom_right + T(0) : -T(0)}};
  if (args.value_mask.data == nullptr) return corners;
  const unsigned char* mask = static_cast<const unsigned char*>(args.value_mask.data);
#pragma unroll
  for (int c = 0; c < CORNERS; ++c) {
    const int64_t at = position + c / 2 * level.width + c % 2;
    if (is_there(corners.weight[c]) &&
        __ldg(mask + work.b * args.value_mask.stride[0] + at * args.value_mask.stride[1]) != 0)
      corners.weight[c] = -T(0);
  }
  return corners;
}

// ---- rows --------------------------------------------------------------------------------------------------------

// From a corner's row to those of its neighbours, in bytes.
struct Steps {
  int64_t right, below;
};

__device__ __forceinline__ Steps steps_of(int64_t stride, int32_t width) { return {stride, width * stride}; }

__device__ __forceinline__ int64_t to_corner(const Steps& steps, int corner) {
  return (corner / 2 ? steps.below : 0) + (corner % 2 ? steps.right : 0);
}

// The rows of value of a batch element and head, from a lane's first channel on.
template <DType STORAGE, int VEC>
struct ValueRows {
  const char* first;
  int64_t stride;  // in bytes

  __device__ __forceinline__ ValueRows(const DeviceArgs& args, const Work& work, int64_t channel) {
    constexpr int64_t BYTES = StorageOf<STORAGE>::BYTES;
    const int64_t at = work.b * args.value.stride[0] + work.h * args.value.stride[2] + channel;
    first = static_cast<const char*>(args.value.data) + at * BYTES;
    stride = args.value.stride[1] * BYTES;
  }

  // VEC values, or zeros where there is nothing to read
  __device__ __forceinline__ Access<STORAGE, VEC> read(int64_t row, int64_t channels, bool readable) const {
    Access<STORAGE, VEC> access{};
    const char* from = first + row + channels * StorageOf<STORAGE>::BYTES;
    if (readable) access = __ldg(reinterpret_cast<const Access<STORAGE, VEC>*>(from));
    return access;
  }
};

}  // namespace rk::ms_deform_attn
