#pragma once
// The forward kernel of deformable attention, plain and fused. A group of LANES lanes has one query and head, each lane
// VECTORS times VEC channels, so a warp has 32 / LANES queries and nothing is exchanged but where the points are.

#include "points.cuh"

namespace rk {
namespace deform {

constexpr int FORWARD_SPAN = 2;

// sums += weight row over the corners of a span of points
template <DType STORAGE, int VEC, int LANES, int VECTORS, typename T>
__device__ __forceinline__ void gather_span(
    const DeviceArgs& args, const void* value, int64_t row, int64_t channel, const Level<T>& level,
    const Corners<T> (&located)[SLOTS<LANES, FORWARD_SPAN>], int span, T (&sums)[VECTORS][VEC]) {
#pragma unroll
  for (int j = 0; j < FORWARD_SPAN; ++j) {
    const Corners<T> corners = corners_at<LANES, SLOTS<LANES, FORWARD_SPAN>>(located, span + j);
#pragma unroll
    for (int c = 0; c < CORNERS; ++c) {
      const int64_t at = row + row_of_corner(corners, c, level.width, args.value.stride[1]) + channel;
      const bool there = is_there(corners.weight[c]);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        T corner[VEC] = {};
        if (there && channel + v * (LANES * VEC) < args.D)
          read_vector<STORAGE, VEC>(value, at + v * (LANES * VEC), corner);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sums[v][i] += corners.weight[c] * corner[i];
      }
    }
  }
}

template <DType STORAGE, int VEC, int LANES, int VECTORS>
__global__ void __launch_bounds__(256, 3)
deform_forward(const __grid_constant__ DeviceArgs args, const __grid_constant__ WorkOrder order) {
  using T = AccumulateOf<STORAGE>;
  const int lane = int(threadIdx.x) % LANES;
  const Work work = work_of(args, order, int32_t(threadIdx.x) / LANES);
  const Softmax<T> softmax = softmax_of<LANES, T>(args, work, lane);
  const int64_t row = work.b * args.value.stride[0] + work.h * args.value.stride[2];
  // once, unless channels are read one by one
  for (int64_t channel = lane * VEC; channel - lane * VEC < args.D; channel += VECTORS * LANES * VEC) {
    T sums[VECTORS][VEC] = {};
    for (int32_t l = 0; l < args.L; ++l) {
      const Level<T> level = level_of<T>(args, work, l);
      for (int32_t first = 0; first < level.points; first += CHUNK<LANES, FORWARD_SPAN>) {
        Corners<T> located[SLOTS<LANES, FORWARD_SPAN>];
#pragma unroll
        for (int slot = 0; slot < SLOTS<LANES, FORWARD_SPAN>; ++slot) {
          const Point<T> point = point_of(args, work, softmax, level, first + slot * LANES + lane);
          located[slot] = corners_of(args, work, level, point);
        }
#pragma unroll 1
        for (int span = 0; span < CHUNK<LANES, FORWARD_SPAN> && first + span < level.points; span += FORWARD_SPAN)
          gather_span<STORAGE, VEC, LANES, VECTORS>(args, args.value.data, row, channel, level, located, span, sums);
      }
    }
    if (!work.exists) continue;
    const int64_t at = ((work.b * args.N + work.n) * args.H + work.h) * args.D + channel;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      if (channel + v * (LANES * VEC) < args.D)
        write_vector<STORAGE, VEC>(args.output.data, at + v * (LANES * VEC), sums[v]);
  }
}

}  // namespace deform
}  // namespace rk
