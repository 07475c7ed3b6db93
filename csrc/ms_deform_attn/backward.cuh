#pragma once
// The backward kernel of deformable attention, plain and fused. A group of LANES lanes has one query and head, as in
// forward; of each point it sums grad_output . corner over its lanes for the gradients of weight and location, which no
// other group has a part in. The points are in shared memory, as the gradient of value goes over those of a whole warp.

#include "value_gradient.cuh"

namespace rk::ms_deform_attn {

// grad_output . corner of the four corners of a point
template <typename T>
struct Products {
  T corner[CORNERS];
};

// The gradient of output, VECTORS times VEC channels of a lane; with no VECTORS read anew for every point, one by one.
template <DType STORAGE, int VEC, int LANES, int VECTORS>
struct GradOutput {
  using T = AccumulateOf<STORAGE>;
  const void* data;
  int64_t row, channels;  // none where there is no query
  T kept[VECTORS > 0 ? VECTORS : 1][VEC];

  __device__ __forceinline__ GradOutput(const DeviceArgs& args, const Work& work) : kept{} {
    const int lane = int(threadIdx.x) % LANES;
    data = args.grad_output.data, channels = work.exists ? args.D : 0;
    row = work.b * args.grad_output.stride[0] + work.n * args.grad_output.stride[1] + work.h * args.D;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t channel = (v * LANES + lane) * VEC;
      if (channel < channels) read_vector<STORAGE, VEC>(data, row + channel, kept[v]);
    }
  }

  // Calls call(first channel, values of grad_output, whether they exist) for the vectors of a lane.
  template <typename Call>
  __device__ __forceinline__ void for_vectors(int lane, Call call) const {
    if constexpr (VECTORS > 0) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) call((v * LANES + lane) * VEC, kept[v], (v * LANES + lane) * VEC < channels);
    } else {
      for (int64_t channel = lane; channel < channels; channel += LANES) {
        T values[1];
        read_vector<STORAGE, 1>(data, row + channel, values);
        call(channel, values, true);
      }
    }
  }
};

// ---- gradients of weights and locations --------------------------------------------------------------------------

// The sums over a group's lanes.
template <DType STORAGE, int VEC, int LANES, int VECTORS, typename T>
__device__ __forceinline__ Products<T> products_of(
    const GradOutput<STORAGE, VEC, LANES, VECTORS>& grad, const ValueRows<STORAGE, VEC>& rows, int lane,
    const Steps& steps, const SharedPoint<T>& point) {
  Products<T> products = {};
  grad.for_vectors(lane, [&](int64_t channel, const T(&values)[VEC], bool readable) {
    Access<STORAGE, VEC> read[CORNERS];
#pragma unroll
    for (int c = 0; c < CORNERS; ++c)
      read[c] =
          rows.read(point.value_row + to_corner(steps, c), channel - lane * VEC, readable && is_there(point.weight[c]));
#pragma unroll
    for (int c = 0; c < CORNERS; ++c) {
      T corner[VEC];
      unpack<STORAGE, VEC>(read[c], corner);
#pragma unroll
      for (int i = 0; i < VEC; ++i) products.corner[c] += values[i] * corner[i];
    }
  });
#pragma unroll
  for (int c = 0; c < CORNERS; ++c)  // 0 times an infinite gradient would be NaN
    products.corner[c] = sum_over_lanes<LANES>(is_there(point.weight[c]) ? products.corner[c] : T(0));
  return products;
}

template <typename T>
struct ReferenceSums {
  T of[4];  // x, y, extent_x, extent_y
};

// Writes the gradients of a point's location or offset, adds to those of its reference; returns that of its weight.
template <typename T>
__device__ __forceinline__ T finish_point(
    const DeviceArgs& args, int64_t row, const Level<T>& level, int64_t k, const Point<T>& point,
    const Products<T>& products, ReferenceSums<T>& sums) {
  const T* s = products.corner;
  const SampleAdjoint<T> adjoint = sample_adjoint(s[0], s[1], s[2], s[3], point.cell.fraction_x, point.cell.fraction_y);
  T x = 0, y = 0;
  if (point.cell.inside) {  // elsewhere an infinite box or weight times 0 would be NaN
    const T width = T(level.width), height = T(level.height);
    const T pixel_x = point.weight * adjoint.x, pixel_y = point.weight * adjoint.y;
    if (!args.fused) {
      x = location_adjoint(pixel_x, width);
      y = location_adjoint(pixel_y, height);
    } else if (args.reference_size == 2) {
      const PointAdjoint<T> of_x = point_adjoint(pixel_x, width), of_y = point_adjoint(pixel_y, height);
      x = of_x.offset, y = of_y.offset;
      sums.of[0] += of_x.reference, sums.of[1] += of_y.reference;
    } else {
      const BoxAdjoint<T> of_x = box_adjoint(pixel_x, level.extent_x, point.x, level.half_step, width);
      const BoxAdjoint<T> of_y = box_adjoint(pixel_y, level.extent_y, point.y, level.half_step, height);
      x = of_x.offset, y = of_y.offset;
      sums.of[0] += of_x.center, sums.of[1] += of_y.center;
      sums.of[2] += of_x.extent, sums.of[3] += of_y.extent;
    }
  }
  const T pair[2] = {x, y};
  write(args.grad_places, 2 * (row * args.K + k), pair);
  return adjoint.weight;
}

template <int LANES, typename T>
__device__ __forceinline__ void write_reference(
    const DeviceArgs& args, const Work& work, int64_t row, int32_t l, int lane, const ReferenceSums<T>& sums) {
  if (args.grad_reference.data == nullptr) return;
  T* to = static_cast<T*>(args.grad_reference.data) + (row * args.L + l) * args.reference_size;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T sum = sum_over_lanes<LANES>(sums.of[i]);
    if (work.exists && lane == 0 && i < args.reference_size) __stcs(to + i, sum);
  }
}

// From the gradients of a query's K weights, which are in shared memory from `at` on, to those of its logits.
template <int LANES, typename T>
__device__ __forceinline__ void write_grad_logits(
    const DeviceArgs& args, const Work& work, const Softmax<T>& softmax, int64_t row, int lane, int at, T expected) {
  __syncwarp();
  if (!work.exists) return;
  for (int64_t k = lane; k < args.K; k += LANES) {
    const T weight = weight_of(args, softmax, row_of_points(args.weights, work) + k);
    const T grad_weight = read_shared<T>(at + int(k * sizeof(T)));
    write(args.grad_weights, row * args.K + k, softmax_adjoint(weight, grad_weight, expected));
  }
}

// ---- kernel ------------------------------------------------------------------------------------------------------

// A query's shared memory: LANES of its points at a time; behind those of all queries the gradients of its K weights.
template <typename T, int LANES>
constexpr int SHARED_POINTS_BYTES = LANES * int(sizeof(SharedPoint<T>));

constexpr int BACKWARD_THREADS = 128;

// Blocks of a multiprocessor, as many as can be without spilling registers.
template <DType STORAGE, int VECTORS>
constexpr int BACKWARD_BLOCKS = STORAGE == DType::float64 || VECTORS != 1 ? 2 : (WIDEST_ADDED == 1 ? 3 : 4);

template <DType STORAGE, int VEC, int LANES, int VECTORS>
__global__ void __launch_bounds__(BACKWARD_THREADS, BACKWARD_BLOCKS<STORAGE, VECTORS>)
    deform_backward(const __grid_constant__ DeviceArgs args, const __grid_constant__ WorkOrder order) {
  using T = AccumulateOf<STORAGE>;
  constexpr int POINT_BYTES = int(sizeof(SharedPoint<T>)), QUERY_BYTES = SHARED_POINTS_BYTES<T, LANES>;
  const int lane = int(threadIdx.x) % LANES, query_of_block = int(threadIdx.x) / LANES;
  const int points_at = query_of_block * QUERY_BYTES, warp_at = int(threadIdx.x) / 32 * (32 * POINT_BYTES);
  const int grad_weights_at = int(blockDim.x) * POINT_BYTES + query_of_block * int(args.K * sizeof(T));
  const Work work = work_of(args, order, query_of_block);
  const Softmax<T> softmax = softmax_of<LANES, T>(args, work, lane);
  const int64_t row = (work.b * args.N + work.n) * args.H + work.h;
  const GradOutput<STORAGE, VEC, LANES, VECTORS> grad(args, work);
  constexpr int ADDED_VECTORS = VECTORS * VEC / ADDED<T, VEC>;
  using Alone = GradOutput<STORAGE, ADDED<T, VEC>, LANES, ADDED_VECTORS>;
  const std::conditional_t<LANES == 32, Alone, Adder<STORAGE, VEC, LANES>> added(args, work);
  const ValueRows<STORAGE, VEC> rows(args, work, lane * VEC);
  const SumRows<T> sums(args, work);
  T expected = 0;  // of the gradients of weights, over the softmax
  int64_t first_cell = 0;
  for (int32_t l = 0; l < args.L; ++l) {
    const Level<T> level = level_of<T>(args, work, l);
    const Steps steps = steps_of(rows.stride, level.width), sum_steps = steps_of(sums.stride, level.width);
    ReferenceSums<T> reference_sums = {};
    for (int32_t first = 0; first < level.points; first += LANES) {
      const int32_t of_chunk = level.points - first < LANES ? level.points - first : LANES;
      const Point<T> own = point_of(args, work, softmax, level, first + lane);
      const Corners<T> corners = corners_of(args, work, level, own);
      const int32_t k = level.first_point + first + lane;
      __syncwarp();  // the points before have been read
      write_shared(points_at + lane * POINT_BYTES, SharedPoint<T>(corners, rows.stride, sums.stride));
      __syncwarp();
      Products<T> products = {};
#pragma unroll 1
      for (int i = 0; i < of_chunk; ++i) {
        const auto point = read_shared<SharedPoint<T>>(points_at + i * POINT_BYTES);
        const Products<T> of_point = products_of(grad, rows, lane, steps, point);
        if (lane == i) products = of_point;
        if (args.grad_value_sums.data == nullptr) continue;
        if constexpr (LANES == 32) add_point(sums, sum_steps, point, added, lane);
        else added.add(sums, sum_steps, warp_at + i * POINT_BYTES, QUERY_BYTES);
      }
      if (!own.exists) continue;
      if (args.cell.data != nullptr) write_cell(args, work, row * args.K + k, first_cell, level, own.cell, corners);
      const T grad_weight = finish_point(args, row, level, k, own, products, reference_sums);
      if (args.fused) write_shared(grad_weights_at + k * int(sizeof(T)), grad_weight);
      else write(args.grad_weights, row * args.K + k, grad_weight);
      expected += own.weight * grad_weight;
    }
    write_reference<LANES>(args, work, row, l, lane, reference_sums);
    first_cell += int64_t(level.height + 1) * (level.width + 1);
  }
  if (args.fused)
    write_grad_logits<LANES>(args, work, softmax, row, lane, grad_weights_at, sum_over_lanes<LANES>(expected));
}

}  // namespace rk::ms_deform_attn
