#pragma once
// The part of CUDA that the kernels use, for a host compiler: threads, shuffles, barriers and memory of simt/block.h.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- where a thread is -------------------------------------------------------------------------------------------

namespace simt {
struct ThreadIndex {
  operator unsigned() const { return unsigned(Block::current().thread()); }
};
struct BlockIndex {
  operator unsigned() const { return unsigned(Block::current().index()); }
};
struct BlockSize {
  operator unsigned() const { return unsigned(Block::current().size()); }
};
template <typename X>
struct FirstDimension {
  X x;
};
}  // namespace simt

static const simt::FirstDimension<simt::ThreadIndex> threadIdx{};
static const simt::FirstDimension<simt::BlockIndex> blockIdx{};
static const simt::FirstDimension<simt::BlockSize> blockDim{};

// ---- shuffles and barriers ---------------------------------------------------------------------------------------

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {
template <typename T>
T shuffled(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = Block::current().shuffle(mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = simt::WARP, SIMT_SITE) {
  const int lane = simt::Block::current().thread() % simt::WARP;
  return simt::shuffled(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), {file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = simt::WARP, SIMT_SITE) {
  const int lane = simt::Block::current().thread() % simt::WARP, source = lane ^ distance;
  const bool same_segment = source / width <= lane / width && source < simt::WARP;
  return simt::shuffled(mask, value, same_segment ? source : lane, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::Block::current().wait(simt::Meeting::warp_barrier, mask, {file, line});
}
inline void __syncthreads(SIMT_SITE) { simt::Block::current().wait(simt::Meeting::block_barrier, 0, {file, line}); }

// ---- memory ------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* from) {
  return simt::Block::current().global().read(from);
}
template <typename T>
void __stcs(T* to, T value) {
  simt::Block::current().global().write(to, value, simt::Block::current().thread_of_grid());
}
template <typename T>
void atomicAdd(T* to, T value) {
  simt::Block::current().global().add_to(to, &value, 1);
}
inline void atomicAdd(float4* to, float4 value) {
  simt::Block::current().global().add_to(reinterpret_cast<float*>(to), &value.x, 4);
}

// ---- bits --------------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  memcpy(&bits, &x, 8);
  return bits;
}

// ---- launches ----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

struct CUstream_st {  // an emulated stream runs what it is given at once
  simt::Memory memory;
  bool backwards = false;
  int64_t launches = 0;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  CUstream_st* stream = nullptr;
};

template <typename... Parameters, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Given&... given) {
  CUstream_st& stream = *config->stream;
  stream.launches += 1;
  const int64_t blocks = config->gridDim.x;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t index = stream.backwards ? blocks - 1 - i : i;
    simt::Block block(
        index, int(config->blockDim.x), int64_t(config->dynamicSmemBytes), stream.memory, stream.backwards);
    block.run([&] { kernel(given...); });
  }
  return cudaSuccess;
}
