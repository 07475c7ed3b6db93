// Routed attention on a CPU. A worker takes a block of 128 queries with all its heads: the bias of a tile of 64 keys is
// computed once and added for every head, so its cost is divided by H. Forward is an online softmax; backward
// recomputes the probabilities from lse. Workers add the gradients of keys into their slots, summed in a fixed order.

#include "backward.h"
#include "forward.h"

namespace rk {
namespace RK_SIMD {

int64_t routed_attention_forward_workspace(const RoutedAttention& a) {
  return a.query.dtype == DType::float64 ? Forward<double>(a).workspace_bytes() : Forward<float>(a).workspace_bytes();
}

void routed_attention_forward(const RoutedAttention& a) {
  a.query.dtype == DType::float64 ? Forward<double>(a).run() : Forward<float>(a).run();
}

int64_t routed_attention_backward_workspace(const RoutedAttention& a) {
  const RoutedAttentionGradients none;
  return a.query.dtype == DType::float64 ? Backward<double>(a, none).workspace_bytes()
                                         : Backward<float>(a, none).workspace_bytes();
}

void routed_attention_backward(const RoutedAttention& a, const RoutedAttentionGradients& grad) {
  a.query.dtype == DType::float64 ? Backward<double>(a, grad).run() : Backward<float>(a, grad).run();
}

}  // namespace RK_SIMD
}  // namespace rk
