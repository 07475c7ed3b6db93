#pragma once
// The arguments of the kernels of multi-scale deformable attention. B batch, S flattened feature positions, H heads,
// D channels of one head, N queries, L levels, K points over all levels. The plain op has locations and weights, the
// fused op reference points, offsets and logits.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk::ms_deform_attn {

struct Args {
  int64_t B, S, H, D, N, L, K;
  const int64_t* spatial_shapes;  // [L, 2] as (h, w)
  const int64_t* starts;          // [L]
  const int64_t* points;          // [L], summing to K

  View value;       // [B, S, H, D], last dimension contiguous
  View value_mask;  // [B, S] bool, true counts as zero; may be absent

  bool fused;
  View places;               // [B, N, H, K, 2], last two contiguous: sampling locations, or offsets if fused
  View weights;              // [B, N, H, K], last contiguous: attention weights, or logits if fused
  View reference;            // [B, N, reference_levels, reference_size], last contiguous; fused only
  int64_t reference_levels;  // 1 or L
  int64_t reference_size;    // 2 as (x, y) or 4 as (cx, cy, w, h)

  View output;  // [B, N, H * D] contiguous

  // backward; the gradients are contiguous and have shape and dtype of what they are gradients of
  View grad_output;  // [B, N, H * D], last dimension contiguous
  View grad_value, grad_places, grad_weights;
  View grad_reference;  // absent where not asked for

  char* workspace;  // of as many bytes as the workspace function says
  Parallel parallel;
};

RK_DECLARE_KERNEL(forward)
RK_DECLARE_KERNEL(backward)

}  // namespace rk::ms_deform_attn
