#pragma once
// The scratch memory of one worker of multi-scale deformable attention.

#include "../common/rows.h"
#include "args.h"

namespace rk::ms_deform_attn::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

#if defined(__clang__)
#define RK_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define RK_INDEPENDENT _Pragma("GCC ivdep") _Pragma("GCC unroll 1")  // before unrolling to single values, vectors
#endif

constexpr int64_t BLOCK = 16;   // points: loops of fixed length, which the compiler turns into vectors
constexpr int64_t CORNERS = 4;  // (row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)
constexpr int64_t QUERIES = 4;  // planned together, so that the latency of one hides behind the others

// The level that each point samples. A padding point is in a level without pixels, so it has no corner.
template <typename T>
struct LevelBlock {
  int32_t height[BLOCK], width[BLOCK], level[BLOCK], exists[BLOCK];
  int64_t start[BLOCK], reference_at[BLOCK];  // among positions; among a query's references, counted in values
  T half_step[BLOCK];                         // 0.5 / P
};

// The points of one query and head.
template <typename T>
struct PointBlock {
  T x[BLOCK], y[BLOCK], weight[BLOCK];  // in pixels of the level; attention weight
  T offset_x[BLOCK], offset_y[BLOCK], reference_x[BLOCK], reference_y[BLOCK], extent_x[BLOCK], extent_y[BLOCK];
  T fraction_x[BLOCK], fraction_y[BLOCK];
  int32_t inside[BLOCK], row[BLOCK], column[BLOCK];
  T corner_weight[CORNERS][BLOCK];
  int64_t value_at[CORNERS][BLOCK], grad_at[CORNERS][BLOCK];  // where rows start, counted in values
  T grad_x[BLOCK], grad_y[BLOCK], grad_weight[BLOCK];
};

// The queries of a (batch, head) pair are cut into parts. Backward sums the rows of a part from zero and adds the sums
// in the order of the parts, whoever has made them. Parts make work for threads where there are few pairs, if the rows
// that a part's points add to are many beside the S rows that it starts from.
inline int64_t parts_of_pair(const Args& args) {
  const int64_t pairs = args.B * args.H, added = args.N * args.K * CORNERS;
  int64_t parts = pairs >= 16 ? 1 : pairs >= 8 ? 2 : 4;
  while (parts > 1 && pairs * parts > 8 && added < 8 * args.S * parts) parts /= 2;
  return parts;
}

// A worker that begins within a pair keeps each of its parts until all have been summed: slices 0 to parts - 2. Others
// add them up, in the last slice but one; the last one is of the part that is added next.
inline int64_t slices_of_worker(const Args& args) {
  const int64_t parts = parts_of_pair(args);
  return parts == 1 ? 1 : parts + 1;
}

template <typename T>
struct Scratch {
  int64_t blocks;  // of the K points of a query and head
  int64_t row;     // D rounded up to whole vectors
  int64_t small_bytes, bytes;
  LevelBlock<T>* levels;           // [blocks]
  PointBlock<T>* points;           // [QUERIES, blocks]
  T *pairs, *singles;              // [blocks, BLOCK, 2], [blocks, BLOCK]: rows of points as they are in memory
  T* products;                     // [CORNERS, BLOCK, LANES]: lanes of grad_output . corner
  T *channels, *zeros;             // [row]
  T *references, *reference_sums;  // [reference_levels, reference_size]
  // of one batch element and head: [S + 1, row], the last row zero (values) or for what falls nowhere (gradients)
  char* value_slice;  // of the storage type
  T* grad_slices;     // [slices of a worker, S + 1, row]

  Scratch(const Args& args, char* base, bool backward) {
    Blocks memory(base);
    blocks = (args.K + BLOCK - 1) / BLOCK;
    row = round_up_to_lanes<T>(args.D);
    levels = memory.take<LevelBlock<T>>(blocks);
    points = memory.take<PointBlock<T>>(QUERIES * blocks);
    pairs = memory.take<T>(2 * BLOCK * blocks);
    singles = memory.take<T>(BLOCK * blocks);
    products = memory.take<T>(CORNERS * BLOCK * LANES<T>);
    channels = memory.take<T>(row);
    zeros = memory.take<T>(row);
    references = memory.take<T>(4 * args.L);
    reference_sums = memory.take<T>(4 * args.L);
    small_bytes = memory.used;
    const int64_t slice = (args.S + 1) * row;
    value_slice = memory.take<char>(slice * bytes_of(args.value.dtype));
    grad_slices = memory.take<T>(backward ? slices_of_worker(args) * slice : 0);
    bytes = memory.used + ALIGNMENT;  // wherever the allocation starts
  }

  // References of type T are read where they are, others converted into `references`.
  static bool reads_references_in_place(const Args& args) { return args.reference.dtype == DTYPE_OF<T>; }

  void prepare(const Args& args) {
    memset(static_cast<void*>(levels), 0, size_t(small_bytes));  // the first block of memory
    for (int64_t l = 0, k = 0; l < args.L; ++l) {
      for (int64_t p = 0; p < args.points[l]; ++p, ++k) {
        LevelBlock<T>& block = levels[k / BLOCK];
        const int64_t i = k % BLOCK;
        block.height[i] = int32_t(args.spatial_shapes[2 * l]);
        block.width[i] = int32_t(args.spatial_shapes[2 * l + 1]);
        block.level[i] = int32_t(l);
        block.exists[i] = 1;
        block.start[i] = args.starts[l];
        const int64_t stride = reads_references_in_place(args) ? args.reference.stride[2] : args.reference_size;
        block.reference_at[i] = args.reference_levels == 1 ? 0 : l * stride;
        block.half_step[i] = T(0.5) / T(args.points[l]);
      }
    }
  }
};

}  // namespace
}  // namespace rk::ms_deform_attn::RK_SIMD
