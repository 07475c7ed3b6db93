#pragma once
// T queries, K classes.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk::sigmoid_focal_loss {

struct Args {
  int64_t T, K;
  double alpha, gamma, scale;
  View logits;             // [T, K]
  const int64_t* targets;  // [T]
  View loss;               // [T], in the accumulate type
  View grad;               // [T, K] or not given: scale times the gradient of each loss
  View grad_loss;          // [T], in the accumulate type
  View grad_logits;        // [T, K]
  Parallel parallel;
  char* workspace;
};

RK_DECLARE_KERNEL(forward)
RK_DECLARE_KERNEL(backward)

}  // namespace rk::sigmoid_focal_loss
