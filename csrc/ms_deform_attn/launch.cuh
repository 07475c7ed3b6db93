#pragma once
// Which kernel, grid and block serve a call; for files that instantiate the launches of one storage type.

#include <cuda_runtime.h>

#include "kernel.cuh"
#include "launch.h"

namespace rk::ms_deform_attn {

constexpr int64_t SHARED_BYTES = 48 * 1024;  // of a block without asking for more
constexpr int64_t MAX_BLOCKS = INT32_MAX;

inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const View& view, int64_t bytes_of_value, int dimensions) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  for (int d = 0; d < dimensions; ++d)
    if (view.stride[d] * bytes_of_value % 16 != 0) return false;
  return true;
}

// Whether rows of channels can be accessed by 16 bytes.
template <DType STORAGE>
bool rows_are_vectors(const DeviceArgs& args) {
  constexpr int64_t BYTES = StorageOf<STORAGE>::BYTES, SUM_BYTES = sizeof(AccumulateOf<STORAGE>);
  return args.D % VECTOR_OF<STORAGE> == 0 && is_aligned(args.value, BYTES, 3) &&
      is_aligned(args.grad_output, BYTES, 2) && is_aligned(args.output, BYTES, 0) &&
      is_aligned(args.grad_value, BYTES, 0) && is_aligned(args.grad_value_sums, SUM_BYTES, 0);
}

inline bool is_supported(const DeviceArgs& args) {
  return args.L <= MAX_LEVELS && args.K <= MAX_POINTS && args.S <= MAX_POSITIONS;
}

// Tiles of positions, as square as powers of two allow, where queries are positions of the levels; else runs of them.
inline WorkOrder order_of(const DeviceArgs& args, int64_t queries_of_block) {
  int64_t positions = 0;
  for (int64_t l = 0; l < args.L; ++l) positions += int64_t(args.levels[l].height) * args.levels[l].width;
  WorkOrder order{};
  order.tile_height = 1, order.tile_width = int32_t(queries_of_block);
  order.queries_are_positions = args.N == positions;
  int64_t tiles = 0;
  if (order.queries_are_positions) {
    while (4 * order.tile_height <= order.tile_width) order.tile_height *= 2, order.tile_width /= 2;
    for (int64_t l = 0; l < args.L; ++l)
      tiles += ceiling(args.levels[l].height, order.tile_height) * ceiling(args.levels[l].width, order.tile_width);
  } else {
    tiles = ceiling(args.N, queries_of_block);
  }
  order.tiles = uint32_t(tiles < MAX_BLOCKS ? tiles : MAX_BLOCKS);
  return order;
}

inline int64_t blocks_of(const DeviceArgs& args, const WorkOrder& order) { return args.B * args.H * order.tiles; }

template <typename... Parameters, typename... Given>
int enqueue(
    void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, CUstream_st* stream,
    const Given&... given) {
  if (blocks == 0) return cudaSuccess;
  if (blocks >= MAX_BLOCKS) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

struct Forward {
  static constexpr int ONE_BY_ONE = 1;  // channels of a lane at a time: VECTORS of the kernel for rows not aligned

  template <DType STORAGE, int VEC, int LANES, int VECTORS>
  static int run(const DeviceArgs& args, CUstream_st* stream) {
    const WorkOrder order = order_of(args, THREADS / LANES);
    return enqueue(
        deform_forward<STORAGE, VEC, LANES, VECTORS>, blocks_of(args, order), THREADS, 0, stream, args, order);
  }
};

struct Backward {
  static constexpr int ONE_BY_ONE = 0;

  template <DType STORAGE, int VEC, int LANES, int VECTORS>
  static int run(const DeviceArgs& args, CUstream_st* stream) {
    using T = AccumulateOf<STORAGE>;
    const int64_t of_query = SHARED_POINTS_BYTES<T, LANES> + (args.fused ? args.K * int64_t(sizeof(T)) : 0);
    int threads = BACKWARD_THREADS;  // fewer where many points fill the shared memory
    while (threads > 32 && threads / LANES * of_query > SHARED_BYTES) threads /= 2;
    const int64_t shared = threads / LANES * of_query;
    if constexpr (LANES < 32)
      if (shared > SHARED_BYTES) return run<STORAGE, 1, 32, 0>(args, stream);
    const WorkOrder order = order_of(args, threads / LANES);
    return enqueue(
        deform_backward<STORAGE, VEC, LANES, VECTORS>, blocks_of(args, order), threads, shared, stream, args, order);
  }
};

// With 16-byte accesses as many lanes, up to 32, as a row of channels needs, or as many vectors of 32 lanes; rows that
// are not aligned, or wider than 256 channels, value by value.
template <typename Kernel, DType STORAGE, int LANES = 8 / VECTOR_OF<STORAGE>, int VECTORS = 1>
int launch(const DeviceArgs& args, CUstream_st* stream) {
  constexpr int VEC = VECTOR_OF<STORAGE>, CHANNELS = VEC * LANES * VECTORS;
  if (args.D > 256 || !rows_are_vectors<STORAGE>(args))
    return Kernel::template run<STORAGE, 1, 32, Kernel::ONE_BY_ONE>(args, stream);
  if constexpr (CHANNELS < 256) {
    constexpr int MORE_LANES = LANES < 32 ? 2 * LANES : 32, MORE_VECTORS = LANES < 32 ? 1 : 2 * VECTORS;
    if (args.D > CHANNELS) return launch<Kernel, STORAGE, MORE_LANES, MORE_VECTORS>(args, stream);
  }
  return Kernel::template run<STORAGE, VEC, LANES, VECTORS>(args, stream);
}

template <DType STORAGE>
int launch_forward(const DeviceArgs& args, CUstream_st* stream) {
  if (!is_supported(args)) return cudaErrorInvalidValue;
  if (args.D == 0) return cudaSuccess;
  return launch<Forward, STORAGE>(args, stream);
}

template <DType STORAGE>
int launch_backward(const DeviceArgs& args, CUstream_st* stream) {
  if (!is_supported(args)) return cudaErrorInvalidValue;
  return launch<Backward, STORAGE>(args, stream);
}

template <DType STORAGE, int VEC>
int enqueue_gather(const DeviceArgs& args, CUstream_st* stream) {
  int lanes = 1;
  while (lanes < 32 && lanes * VEC < args.D) lanes *= 2;
  return enqueue(
      deform_gather<STORAGE, VEC>, ceiling(args.B * args.S * args.H, THREADS / 32), THREADS, 0, stream, args, lanes);
}

template <DType STORAGE>
int launch_gather(const DeviceArgs& args, CUstream_st* stream) {
  if (!is_supported(args)) return cudaErrorInvalidValue;
  if (args.D == 0) return cudaSuccess;
  return rows_are_vectors<STORAGE>(args) ? enqueue_gather<STORAGE, VECTOR_OF<STORAGE>>(args, stream)
                                         : enqueue_gather<STORAGE, 1>(args, stream);
}

}  // namespace rk::ms_deform_attn
