// Routed attention on a CPU. A worker takes a block of 128 queries with all its heads: the bias of a tile of 64 keys is
// computed once and added for every head, so its cost is divided by H. Forward is an online softmax; backward
// recomputes the probabilities from lse. Gradients of keys are summed over parts of the queries, then over the parts.

#include "backward.h"
#include "forward.h"

namespace rk::routed_attention::RK_SIMD {

using namespace rk::RK_SIMD;

int64_t forward_workspace(const Args& a) {
  return a.query.dtype == DType::float64 ? Forward<double>(a).workspace_bytes() : Forward<float>(a).workspace_bytes();
}

void forward(const Args& a) { a.query.dtype == DType::float64 ? Forward<double>(a).run() : Forward<float>(a).run(); }

int64_t backward_workspace(const Args& a) {
  return a.query.dtype == DType::float64 ? Backward<double>(a).workspace_bytes() : Backward<float>(a).workspace_bytes();
}

void backward(const Args& a) { a.query.dtype == DType::float64 ? Backward<double>(a).run() : Backward<float>(a).run(); }

}  // namespace rk::routed_attention::RK_SIMD
