#pragma once
// The arguments of the CUDA kernels of multi-scale deformable attention, by value: the device reads no memory of the
// host. Dimensions as in args.h; "accumulate" is float64 for a float64 value and float32 for any other.

#include "../common/view.h"

namespace rk::ms_deform_attn {

constexpr int64_t MAX_LEVELS = 32;
constexpr int64_t MAX_POINTS = 4096;          // K; a query's gradients of weights meet in shared memory
constexpr int64_t MAX_POSITIONS = INT32_MAX;  // S; products of a position and a stride are 64-bit

struct DeviceLevel {
  int64_t start;  // among positions
  int32_t height, width;
  int32_t first_point, points;
};

struct DeviceArgs {
  int64_t B, S, H, D, N, L, K;
  DeviceLevel levels[MAX_LEVELS];

  View value;       // [B, S, H, D], last dimension contiguous
  View value_mask;  // [B, S] bool, true counts as zero; may be absent

  bool fused;
  View places;               // [B, N, H, K, 2], last two contiguous: sampling locations, or offsets if fused
  View weights;              // [B, N, H, K], last contiguous: attention weights, or logits if fused
  View reference;            // [B, N, reference_levels, reference_size], last contiguous; fused only
  int64_t reference_levels;  // 1 or L
  int64_t reference_size;    // 2 as (x, y) or 4 as (cx, cy, w, h)

  View output;  // [B, N, H * D] contiguous, dtype of value

  // Backward. The gradients are contiguous.
  View grad_output;     // [B, N, H * D], last dimension contiguous, dtype of value
  View grad_places;     // [B, N, H, K, 2], dtype of places
  View grad_weights;    // [B, N, H, K], dtype of weights; of the logits if fused
  View grad_reference;  // [B, N, H, L, reference_size] of each head and level, accumulate; the host sums. May be absent

  // The gradient of value, either by atomics (launch_backward adds to it)
  View grad_value_sums;  // [B, S, H, D], accumulate, which the host has filled with zeros; absent if deterministic
  // or in a fixed order: launch_backward writes `cell` and `corner_weight`, the host sorts the cells stably, and
  // launch_gather writes grad_value. A cell is what a point falls into: each (batch, head) pair has
  // `cells` = 1 + sum over levels of (h + 1)(w + 1), the last for points that are nowhere.
  int64_t cells;
  View cell;           // [B, N, H, K], int32 or, from 2^31 cells of all pairs on, int64
  View corner_weight;  // [B, N, H, K, 4], accumulate
  View order;          // [B N H K] int64: the points, cell after cell
  View bounds;         // [B H cells + 1] int64: where each cell starts in `order`
  View grad_value;     // [B, S, H, D] contiguous, dtype of value; written by launch_gather only
};

}  // namespace rk::ms_deform_attn
