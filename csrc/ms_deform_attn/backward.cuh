#pragma once
// The backward kernel of deformable attention, plain and fused. A group of LANES lanes has one query and head, as in
// forward; of each point it sums grad_output . corner over its lanes for the gradients of weight and location, which no
// other group has a part in, and adds weight grad_output to the gradient of value by reductions of ADDED values.

#include "../common/shared_array.cuh"
#include "points.cuh"

namespace rk {
namespace deform {

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

  __device__ __forceinline__ GradOutput(const DeviceArgs& args, const Work& work, int lane) : kept{} {
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
      for (int v = 0; v < VECTORS; ++v) call(v * (LANES * VEC), kept[v], (v * LANES + lane) * VEC < channels);
    } else {
      for (int64_t channel = lane; channel < channels; channel += LANES) {
        T values[1];
        read_vector<STORAGE, 1>(data, row + channel, values);
        call(channel - lane, values, true);
      }
    }
  }
};

// ---- gradients of weights and locations --------------------------------------------------------------------------

template <DType STORAGE, int VEC, int LANES, int VECTORS, typename T>
__device__ __forceinline__ Products<T> products_of_lane(
    const GradOutput<STORAGE, VEC, LANES, VECTORS>& grad, const ValueRows<STORAGE, VEC>& rows, int lane, int32_t width,
    const Corners<T>& corners) {
  Products<T> products = {};
  grad.for_vectors(lane, [&](int64_t channel, const T(&values)[VEC], bool readable) {
    Access<STORAGE, VEC> read[CORNERS];
#pragma unroll
    for (int c = 0; c < CORNERS; ++c) read[c] = rows.read(corners, c, width, channel, readable);
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
    products.corner[c] = is_there(corners.weight[c]) ? products.corner[c] : T(0);
  return products;
}

// The sums over a group's lanes of the products of POINTS points from `first` on: afterwards lane i has those of point
// first + i % POINTS. Each exchange halves the points that a lane has a part of.
template <int POINTS, typename T, typename OfLane>
__device__ __forceinline__ Products<T> exchange(int lane, int first, const OfLane& products_of) {
  if constexpr (POINTS == 1) {
    return products_of(first);
  } else {
    constexpr int HALF = POINTS / 2;
    const Products<T> low = exchange<HALF, T>(lane, first, products_of);
    const Products<T> high = exchange<HALF, T>(lane, first + HALF, products_of);
    const bool upper = (lane & HALF) != 0;
    Products<T> sums;
#pragma unroll
    for (int c = 0; c < CORNERS; ++c) {
      const T kept = upper ? high.corner[c] : low.corner[c], given = upper ? low.corner[c] : high.corner[c];
      sums.corner[c] = kept + __shfl_xor_sync(ALL_LANES, given, HALF);
    }
    return sums;
  }
}

// Of SPAN points: those of point `span` + i belong to the slot and lane that located it.
template <int LANES, int SPAN, int SLOTS, typename T, typename OfLane>
__device__ __forceinline__ void sum_products(
    int lane, int span, const OfLane& products_of, Products<T> (&products)[SLOTS]) {
  constexpr int TOGETHER = LANES < SPAN ? LANES : SPAN;
#pragma unroll
  for (int j = 0; j < SPAN; j += TOGETHER) {
    Products<T> sums = exchange<TOGETHER, T>(lane, span + j, products_of);
#pragma unroll
    for (int distance = TOGETHER; distance < LANES; distance *= 2)
#pragma unroll
      for (int c = 0; c < CORNERS; ++c) sums.corner[c] += __shfl_xor_sync(ALL_LANES, sums.corner[c], distance);
    if (LANES <= SPAN) products[j / TOGETHER] = sums;
    else if (lane / SPAN == span / SPAN) products[0] = sums;
  }
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

// From the gradients of a query's K weights, in shared memory, to those of its logits.
template <int LANES, typename T>
__device__ __forceinline__ void write_grad_logits(
    const DeviceArgs& args, const Work& work, const Softmax<T>& softmax, int64_t row, int lane,
    const SharedArray<T>& grad_weights, int first, T expected) {
  __syncwarp();
  if (!work.exists) return;
  for (int64_t k = lane; k < args.K; k += LANES) {
    const T weight = weight_of(args, softmax, row_of_points(args.weights, work) + k);
    write(args.grad_weights, row * args.K + k, softmax_adjoint(weight, grad_weights.read(first + int(k)), expected));
  }
}

// ---- gradient of value -------------------------------------------------------------------------------------------

#if defined(RK_ADDED)
constexpr int WIDEST_ADDED = RK_ADDED;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int WIDEST_ADDED = 4;
#else
constexpr int WIDEST_ADDED = 1;  // before sm_90 there is no reduction of float vectors
#endif

// Values added by one reduction. Lanes add to neighbouring places, so a lane adds to other channels than it reads where
// an access reads more values than a reduction adds.
template <typename T, int VEC>
constexpr int ADDED = sizeof(T) == 8 || VEC < WIDEST_ADDED ? 1 : WIDEST_ADDED;

template <DType STORAGE, int VEC, int LANES, int VECTORS>
using AddedOutput = GradOutput<
    STORAGE, ADDED<AccumulateOf<STORAGE>, VEC>, LANES, VECTORS * VEC / ADDED<AccumulateOf<STORAGE>, VEC>>;

// The rows of the gradient of value of a batch element and head, from a lane's first channel on.
template <typename T, int VEC>
struct SumRows {
  char* first;
  int64_t stride;  // in bytes

  __device__ __forceinline__ SumRows(const DeviceArgs& args, const Work& work, int lane) {
    const int64_t at = (work.b * args.S * args.H + work.h) * args.D + lane * ADDED<T, VEC>;
    first = static_cast<char*>(args.grad_value_sums.data) + at * int64_t(sizeof(T));
    stride = args.H * args.D * int64_t(sizeof(T));
  }
};

// grad_value += weight grad_output at the corners of a point
template <DType STORAGE, int COUNT, int LANES, int VECTORS, int VEC, typename T>
__device__ __forceinline__ void add_point(
    const GradOutput<STORAGE, COUNT, LANES, VECTORS>& grad, const SumRows<T, VEC>& rows, int lane, int32_t width,
    const Corners<T>& corners) {
#pragma unroll
  for (int c = 0; c < CORNERS; ++c) {
    if (!is_there(corners.weight[c])) continue;
    T* const to = reinterpret_cast<T*>(rows.first + row_of_corner(corners, c, width, rows.stride));
    grad.for_vectors(lane, [&](int64_t channel, const T(&values)[COUNT], bool exists) {
      T part[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) part[i] = corners.weight[c] * values[i];
      if (exists) add(to + channel, part);
    });
  }
}

// In place of sums: the cell that a point falls into and what its corners weigh.
template <typename T>
__device__ __forceinline__ void write_cell(
    const DeviceArgs& args, const Work& work, int64_t at, int64_t first_cell, const Level<T>& level,
    const Point<T>& point, const Corners<T>& corners) {
  int64_t cell = args.cells - 1;
  if (point.cell.inside) cell = first_cell + int64_t(point.cell.row + 1) * (level.width + 1) + point.cell.column + 1;
  cell += (work.b * args.H + work.h) * args.cells;
  if (args.cell.dtype == DType::int32) __stcs(static_cast<int*>(args.cell.data) + at, int(cell));
  else __stcs(static_cast<long long*>(args.cell.data) + at, (long long)(cell));
  T* to = static_cast<T*>(args.corner_weight.data) + CORNERS * at;
#pragma unroll
  for (int c = 0; c < CORNERS; ++c) __stcs(to + c, corners.weight[c]);
}

// ---- kernel ------------------------------------------------------------------------------------------------------

// Blocks of a multiprocessor, so many that nothing is spilled.
template <DType STORAGE, int VECTORS>
constexpr int BACKWARD_BLOCKS = STORAGE == DType::float64 || VECTORS != 1 ? 1 : 2;

template <DType STORAGE, int VEC, int LANES, int VECTORS>
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS<STORAGE, VECTORS>)
deform_backward(const __grid_constant__ DeviceArgs args, const __grid_constant__ WorkOrder order) {
  using T = AccumulateOf<STORAGE>;
  constexpr int SPAN = VECTORS > 2 ? 1 : 2, CHUNK = LANES < SPAN ? SPAN : LANES, SLOTS = CHUNK / LANES;
  const int lane = int(threadIdx.x) % LANES, query_of_block = int(threadIdx.x) / LANES;
  const Work work = work_of(args, order, query_of_block);
  const Softmax<T> softmax = softmax_of<LANES, T>(args, work, lane);
  const int64_t row = (work.b * args.N + work.n) * args.H + work.h;
  const GradOutput<STORAGE, VEC, LANES, VECTORS> grad(args, work, lane);
  const AddedOutput<STORAGE, VEC, LANES, VECTORS> added(args, work, lane);
  const ValueRows<STORAGE, VEC> rows(args, work, lane * VEC);
  const SumRows<T, VEC> sums(args, work, lane);
  SharedArray<T> grad_weights;
  const int first_shared = query_of_block * int(args.K);
  T expected = 0;  // of the gradients of weights, over the softmax
  int64_t first_cell = 0;
  for (int32_t l = 0; l < args.L; ++l) {
    const Level<T> level = level_of<T>(args, work, l);
    ReferenceSums<T> reference_sums = {};
    for (int32_t first = 0; first < level.points; first += CHUNK) {
      Point<T> points[SLOTS];
      Corners<T> located[SLOTS], added_at[SLOTS];  // in value and in its gradient
      Products<T> products[SLOTS] = {};
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) {
        points[slot] = point_of(args, work, softmax, level, first + slot * LANES + lane);
        const Corners<T> corners = corners_of(args, work, level, points[slot]);
        located[slot] = in_bytes(corners, rows.stride);
        added_at[slot] = in_bytes(corners, sums.stride);
      }
#pragma unroll 1
      for (int span = 0; span < CHUNK && first + span < level.points; span += SPAN) {
        const auto products_of = [&](int index) {
          return products_of_lane(grad, rows, lane, level.width, corners_at<LANES>(located, index));
        };
        sum_products<LANES, SPAN>(lane, span, products_of, products);
        if (args.grad_value_sums.data == nullptr) continue;
#pragma unroll
        for (int j = 0; j < SPAN; ++j)
          add_point(added, sums, lane, level.width, corners_at<LANES>(added_at, span + j));
      }
#pragma unroll
      for (int slot = 0; slot < SLOTS; ++slot) {
        if (!points[slot].exists) continue;
        const int32_t k = level.first_point + first + slot * LANES + lane;
        const T grad_weight = finish_point(args, row, level, k, points[slot], products[slot], reference_sums);
        if (args.fused) grad_weights.write(first_shared + k, grad_weight);
        else write(args.grad_weights, row * args.K + k, grad_weight);
        expected += points[slot].weight * grad_weight;
        if (args.cell.data != nullptr)
          write_cell(args, work, row * args.K + k, first_cell, level, points[slot], located[slot]);
      }
    }
    write_reference<LANES>(args, work, row, l, lane, reference_sums);
    first_cell += int64_t(level.height + 1) * (level.width + 1);
  }
  if (args.fused)
    write_grad_logits<LANES>(
        args, work, softmax, row, lane, grad_weights, first_shared, sum_over_lanes<LANES>(expected));
}

}  // namespace deform
}  // namespace rk
