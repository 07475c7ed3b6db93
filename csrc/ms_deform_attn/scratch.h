#pragma once
// The scratch memory of one worker of multi-scale deformable attention.

#include "../common/rows.h"
#include "args.h"

namespace rk {
namespace RK_SIMD {
namespace {

#if defined(__clang__)
#define RK_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define RK_INDEPENDENT _Pragma("GCC ivdep")  // the steps of this loop touch different memory
#endif

constexpr int64_t BLOCK = 16;   // loops over points take whole blocks, so that the compiler makes vectors of them
constexpr int64_t CORNERS = 4;  // (row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)

// Per point: [padded], K rounded up to BLOCK. A padding point is in a level without pixels, so it has no corner.
template <typename T>
struct Scratch {
  int64_t padded;
  int64_t row;  // D rounded up to whole vectors
  int64_t small_bytes, bytes;
  // of the level that a point samples
  int32_t *height, *width, *level;
  int64_t* start;
  T* half_step;
  // of one query and head
  T *pairs, *x, *y, *weight, *offset_x, *offset_y, *reference_x, *reference_y, *extent_x, *extent_y;
  T *fraction_x, *fraction_y, *corner_weight[CORNERS];
  int32_t *inside, *row_of_cell, *column_of_cell;
  int64_t *value_at[CORNERS], *grad_at[CORNERS];  // where corners start, counted in values of T from the first row
  T *partial[CORNERS], *dot[CORNERS], *grad_x, *grad_y, *grad_weight;
  T *channels, *zeros;  // [row]
  T* reference_sums;    // [reference_levels, reference_size]
  // of one batch element and head: [S + 1, row], the last row zero (values) or for what falls nowhere (gradients)
  T* value_slice;
  T* grad_slice[2];  // of a pair that other workers share, and of any other pair

  Scratch(const deform::Args& args, char* base, bool backward) {
    Blocks blocks(base);
    padded = (args.K + BLOCK - 1) / BLOCK * BLOCK;
    row = round_up_to_lanes<T>(args.D);
    int32_t** const integers[] = {&height, &width, &level, &inside, &row_of_cell, &column_of_cell};
    for (int32_t** block : integers) *block = blocks.take<int32_t>(padded);
    start = blocks.take<int64_t>(padded);
    T** const numbers[] = {&half_step, &x, &y, &weight, &offset_x, &offset_y, &reference_x, &reference_y,
                           &extent_x, &extent_y, &fraction_x, &fraction_y, &grad_x, &grad_y, &grad_weight};
    for (T** block : numbers) *block = blocks.take<T>(padded);
    for (int64_t c = 0; c < CORNERS; ++c) {
      value_at[c] = blocks.take<int64_t>(padded);
      grad_at[c] = blocks.take<int64_t>(padded);
      corner_weight[c] = blocks.take<T>(padded);
      dot[c] = blocks.take<T>(padded);
      partial[c] = blocks.take<T>(backward ? padded * LANES<T> : 0);
    }
    pairs = blocks.take<T>(2 * padded);
    channels = blocks.take<T>(row);
    zeros = blocks.take<T>(row);
    reference_sums = blocks.take<T>(4 * args.L);
    small_bytes = blocks.used;
    const bool shares_pairs = args.B * args.H % args.parallel.workers != 0;
    value_slice = blocks.take<T>((args.S + 1) * row);
    grad_slice[0] = blocks.take<T>(backward && shares_pairs ? (args.S + 1) * row : 0);
    grad_slice[1] = blocks.take<T>(backward ? (args.S + 1) * row : 0);
    bytes = blocks.used;
  }

  void prepare(const deform::Args& args) {
    memset(height, 0, size_t(small_bytes));  // height is the first block
    for (int64_t l = 0, k = 0; l < args.L; ++l) {
      for (int64_t p = 0; p < args.points[l]; ++p, ++k) {
        height[k] = int32_t(args.spatial_shapes[2 * l]);
        width[k] = int32_t(args.spatial_shapes[2 * l + 1]);
        level[k] = int32_t(l);
        start[k] = args.starts[l];
        half_step[k] = T(0.5) / T(args.points[l]);
      }
    }
  }
};

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
