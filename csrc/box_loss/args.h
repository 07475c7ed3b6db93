#pragma once
// M predicted boxes, T true ones.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk::box_loss {

struct Args {
  int64_t M, T;
  double l1_weight, giou_weight;
  View boxes;              // [M, 4]
  const void* true_boxes;  // [T, 4], in the accumulate type
  const int64_t* target;   // [M], which of the true boxes; any number outside [0, T) is none
  View output;             // [M, 2] L1 and GIoU loss, weighted, in the accumulate type
  View grad_output;        // [M, 2], in the accumulate type
  View grad_boxes;         // [M, 4]
  Parallel parallel;
  char* workspace;
};

RK_DECLARE_KERNEL(forward)
RK_DECLARE_KERNEL(backward)

}  // namespace rk::box_loss
