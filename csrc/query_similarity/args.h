#pragma once
// B batch, N queries, C channels.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk {

struct QuerySimilarity {
  int64_t batch, queries, channels;
  View x;       // [B, N, C]
  View output;  // [B, N]
  Parallel parallel;
  char* workspace;
};

RK_DECLARE_LEVELS(int64_t, query_similarity_workspace, const QuerySimilarity&)
RK_DECLARE_LEVELS(void, query_similarity_relu, const QuerySimilarity&)

}  // namespace rk
