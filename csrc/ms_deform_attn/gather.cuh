#pragma once
// The gradient of value in a fixed order: a warp sums over the points around one position of one head. The points come
// sorted by the cell they fall into; a position is a corner of four cells, so its sum has four runs of points. Nothing
// is added by two warps: bit for bit the same every time.

#include "points.cuh"

namespace rk::ms_deform_attn {

__device__ __forceinline__ int64_t read_index(const View& view, int64_t at) {
  return __ldg(static_cast<const long long*>(view.data) + at);
}

// sums += corner_weight grad_output over the points [begin, end) of a run, of which this group takes every GROUPS-th
template <DType STORAGE, int VEC, typename T>
__device__ __forceinline__ void add_run(
    const DeviceArgs& args, int64_t begin, int64_t end, int groups, int corner, int64_t row, int64_t channel,
    T (&sums)[VEC]) {
  const T* weights = static_cast<const T*>(args.corner_weight.data);
  for (int64_t i = begin; i < end; i += groups) {
    const int64_t point = read_index(args.order, i);
    const T weight = __ldg(weights + CORNERS * point + corner);
    if (!is_there(weight) || channel >= args.D) continue;
    const int64_t query = point / args.K / args.H % args.N;
    T grad[VEC];
    read_vector<STORAGE, VEC>(args.grad_output.data, row + query * args.grad_output.stride[1] + channel, grad);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sums[j] += weight * grad[j];
  }
}

// `lanes` have one row of channels; the 32 / lanes groups of a warp share the points of a position.
template <DType STORAGE, int VEC>
__global__ void __launch_bounds__(THREADS, 4) deform_gather(const __grid_constant__ DeviceArgs args, const int lanes) {
  using T = AccumulateOf<STORAGE>;
  const int lane_of_warp = int(threadIdx.x) % 32, lane = lane_of_warp % lanes, group = lane_of_warp / lanes;
  const int64_t row = blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;  // [B, S, H]
  if (row >= args.B * args.S * args.H) return;
  const int64_t h = row % args.H, position = row / args.H % args.S, b = row / args.H / args.S;
  const int64_t grad_row = b * args.grad_output.stride[0] + h * args.D;
  const bool masked = args.value_mask.data != nullptr &&
      __ldg(
          static_cast<const unsigned char*>(args.value_mask.data) + b * args.value_mask.stride[0] +
          position * args.value_mask.stride[1]) != 0;
  for (int64_t channel = lane * VEC; channel - lane * VEC < args.D; channel += lanes * VEC) {
    T sums[VEC] = {};
    int64_t first_cell = (b * args.H + h) * args.cells;
    for (int32_t l = 0; l < args.L; ++l) {
      const int64_t height = args.levels[l].height, width = args.levels[l].width;
      const int64_t place = position - args.levels[l].start;
      if (!masked && place >= 0 && place < height * width) {
        // of the cell above left this is the last corner, of the one below right the first
        const int64_t cell = first_cell + place / width * (width + 1) + place % width;
        for (int corner = 0; corner < CORNERS; ++corner) {
          const int64_t of_corner = cell + (1 - corner / 2) * (width + 1) + (1 - corner % 2);
          add_run<STORAGE, VEC>(
              args, read_index(args.bounds, of_corner) + group, read_index(args.bounds, of_corner + 1), 32 / lanes,
              corner, grad_row, channel, sums);
        }
      }
      first_cell += (height + 1) * (width + 1);
    }
    for (int distance = lanes; distance < 32; distance *= 2)
#pragma unroll
      for (int j = 0; j < VEC; ++j) sums[j] += __shfl_xor_sync(ALL_LANES, sums[j], distance);
    if (group == 0 && channel < args.D) write_vector<STORAGE, VEC>(args.grad_value.data, row * args.D + channel, sums);
  }
}

}  // namespace rk::ms_deform_attn
