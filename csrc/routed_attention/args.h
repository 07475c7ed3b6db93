#pragma once
// B batch, H heads, N queries, M keys, D channels of one head, R rank of a product, G rank of the gate.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/view.h"

namespace rk::routed_attention {

struct Gradients {
  View output;             // [B, H, N, D], incoming
  View query, key, value;  // contiguous, as their inputs
  View sup_q, sup_k, del_q, del_k, gate_q, gate_k;
  View strength;  // [B, N] accumulate type, rows that sum to it; or none
};

struct Args {
  int64_t batch, heads, queries, keys, channels;
  int64_t sup_rank, del_rank, gate_rank;  // read where routed
  bool routed;
  double scale, strength, limit;  // limit is infinity where there is none
  View query;                     // [B, H, N, D]
  View key, value;                // [B, H, M, D]
  View sup_q, del_q;              // [B, N, R]
  View sup_k, del_k;              // [B, M, R]
  View gate_q;                    // [B, N, G]
  View gate_k;                    // [B, M, G]
  View attn_mask;                 // [B, H, N, M], any strides; bool (true = may attend) or floating; or none
  View key_ranges;                // int32 [B, N, 2, 2], contiguous but for B and N; or none
  View output;                    // [B, H, N, D]
  View lse;        // [B, H, N] ln(sum_j exp(S)), accumulate type; +inf where a query has no key to attend
  Gradients grad;  // of a backward pass
  Parallel parallel;
  char* workspace;
};

RK_DECLARE_KERNEL(forward)
RK_DECLARE_KERNEL(backward)

}  // namespace rk::routed_attention
