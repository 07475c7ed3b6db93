#pragma once
// T tokens, C channels; x^ of `kept` channels lies beside the output: all of them in order, or those in `channels`.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk::add_layer_norm {

struct Args {
  int64_t T, C, kept;
  double eps;
  View x, residual;         // [T, C]
  View weight, bias;        // [C]
  View output;              // [T, C]
  View rstd;                // [T], in the accumulate type
  View normalized;          // [T, kept]
  const int32_t* channels;  // [kept]
  View grad_output;         // [T, C]
  View grad_sum;            // [T, C]
  View sums;                // [parts, 2, C] of grad weight and grad bias, in the accumulate type
  int64_t parts;
  Parallel parallel;
  char* workspace;
};

RK_DECLARE_KERNEL(forward)
RK_DECLARE_KERNEL(backward)

}  // namespace rk::add_layer_norm
