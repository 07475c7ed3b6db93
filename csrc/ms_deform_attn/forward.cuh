#pragma once
// The forward kernel of deformable attention, plain and fused. A group of LANES lanes has one query and head, each lane
// VECTORS times VEC channels, so a warp has 32 / LANES queries and nothing is exchanged but where the points are.

#include "points.cuh"

namespace rk::ms_deform_attn {

// A point in the form that the lane which located it tells the others.
template <typename T>
struct LocatedPoint {
  int64_t row;  // of the first corner, in bytes
  T weight[CORNERS];
};

// Point `index` of those that a group located at a time: by lane index % LANES, in its slot index / LANES.
template <int LANES, int SLOTS, typename T>
__device__ __forceinline__ LocatedPoint<T> told_by(const LocatedPoint<T> (&located)[SLOTS], int index) {
  if constexpr (LANES == 1) {
    return located[index];
  } else {
    const LocatedPoint<T>& from = located[SLOTS == 1 ? 0 : index / LANES];
    LocatedPoint<T> point;
    point.row = __shfl_sync(ALL_LANES, (long long)(from.row), index % LANES, LANES);
#pragma unroll
    for (int c = 0; c < CORNERS; ++c) point.weight[c] = __shfl_sync(ALL_LANES, from.weight[c], index % LANES, LANES);
    return point;
  }
}

// sums += weight row over the corners of SPAN points, whose rows are in flight together
template <DType STORAGE, int VEC, int LANES, int VECTORS, int SPAN, int SLOTS, typename T>
__device__ __forceinline__ void gather_span(
    const ValueRows<STORAGE, VEC>& rows, const bool (&readable)[VECTORS], const Steps& steps,
    const LocatedPoint<T> (&located)[SLOTS], int span, T (&sums)[VECTORS][VEC]) {
  LocatedPoint<T> points[SPAN];
  Access<STORAGE, VEC> read[SPAN][CORNERS][VECTORS];
#pragma unroll
  for (int j = 0; j < SPAN; ++j) {
    points[j] = told_by<LANES>(located, span + j);
#pragma unroll
    for (int c = 0; c < CORNERS; ++c)
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        read[j][c][v] = rows.read(
            points[j].row + to_corner(steps, c), v * (LANES * VEC), readable[v] && is_there(points[j].weight[c]));
  }
#pragma unroll
  for (int j = 0; j < SPAN; ++j)
#pragma unroll
    for (int c = 0; c < CORNERS; ++c)
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        T corner[VEC];
        unpack<STORAGE, VEC>(read[j][c][v], corner);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sums[v][i] += points[j].weight[c] * corner[i];
      }
}

template <DType STORAGE, int VEC, int LANES, int VECTORS, typename T>
__device__ __forceinline__ void forward_channels(
    const DeviceArgs& args, const Work& work, const Softmax<T>& softmax, int lane, int64_t channel) {
  constexpr int SPAN = VECTORS > 1 || LANES == 1 ? 1 : 2, CHUNK = LANES < SPAN ? SPAN : LANES, SLOTS = CHUNK / LANES;
  const ValueRows<STORAGE, VEC> rows(args, work, channel);
  bool readable[VECTORS];
  T sums[VECTORS][VEC] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) readable[v] = channel + v * (LANES * VEC) < args.D;
  for (int32_t l = 0; l < args.L; ++l) {
    const Level<T> level = level_of<T>(args, work, l);
    const Steps steps = steps_of(rows.stride, level.width);
    for (int32_t first = 0; first < level.points; first += CHUNK) {
      LocatedPoint<T> located[SLOTS];
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) {
        const Point<T> point = point_of(args, work, softmax, level, first + slot * LANES + lane);
        const Corners<T> corners = corners_of(args, work, level, point);
        located[slot].row = corners.position * rows.stride;
#pragma unroll
        for (int c = 0; c < CORNERS; ++c) located[slot].weight[c] = corners.weight[c];
      }
#pragma unroll 1
      for (int span = 0; span < CHUNK && first + span < level.points; span += SPAN)
        gather_span<STORAGE, VEC, LANES, VECTORS, SPAN>(rows, readable, steps, located, span, sums);
    }
  }
  if (!work.exists) return;
  const int64_t at = ((work.b * args.N + work.n) * args.H + work.h) * args.D + channel;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
    if (readable[v]) write_vector<STORAGE, VEC>(args.output.data, at + v * (LANES * VEC), sums[v]);
}

template <DType STORAGE, int VEC, int LANES, int VECTORS>
__global__ void __launch_bounds__(THREADS, VEC == 1 || VECTORS > 2 ? 2 : 3)
    deform_forward(const __grid_constant__ DeviceArgs args, const __grid_constant__ WorkOrder order) {
  using T = AccumulateOf<STORAGE>;
  const int lane = int(threadIdx.x) % LANES;
  const Work work = work_of(args, order, int32_t(threadIdx.x) / LANES);
  const Softmax<T> softmax = softmax_of<LANES, T>(args, work, lane);
  if constexpr (VEC > 1) {
    forward_channels<STORAGE, VEC, LANES, VECTORS>(args, work, softmax, lane, lane * VEC);
  } else {
    for (int64_t first = 0; first < args.D; first += LANES)
      forward_channels<STORAGE, 1, LANES, 1>(args, work, softmax, lane, first + lane);
  }
}

}  // namespace rk::ms_deform_attn
