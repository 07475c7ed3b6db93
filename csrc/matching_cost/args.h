#pragma once
// B images, G branches, N predictions, K classes; T targets of all images, those of an image side by side.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk::matching_cost {

struct Args {
  int64_t B, G, N, K;
  double class_weight, l1_weight, giou_weight, alpha, gamma;
  View logits;             // [B, G, N, K]
  View lse;                // [B, G, N] in the accumulate type, or not given: the focal cost
  View boxes;              // [B, G, N, 4]
  const void* true_boxes;  // [T, 4] in the accumulate type
  const int64_t* labels;   // [T]
  const int64_t* counts;   // [B] targets of each image
  View output;             // [T, G, N] in the accumulate type
  int64_t most;            // targets of the fullest image
  Parallel parallel;
  char* workspace;
};

RK_DECLARE_KERNEL(forward)

}  // namespace rk::matching_cost
