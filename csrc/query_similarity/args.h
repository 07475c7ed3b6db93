#pragma once
// B batch, N queries, C channels.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk::query_similarity {

struct Args {
  int64_t batch, queries, channels;
  View x;       // [B, N, C]
  View output;  // [B, N]
  Parallel parallel;
  char* workspace;
};

RK_DECLARE_KERNEL(forward)

}  // namespace rk::query_similarity
