#include "../common/stable_tensor.h"
#include "args.h"

namespace rk::routed_attention {
namespace {

// qkv: query, key, value. outputs: output, lse. routing: nothing, the six factors, or these and [2]: strength and
// limit, which then take the place of the numbers. scalars: scale, strength, limit; the limit is infinity where there
// is none.
Args arguments(
    const Tensors& qkv, const Tensors& routing, const MaybeTensor& attn_mask, const MaybeTensor& key_ranges,
    const Numbers& scalars, const Tensors& outputs) {
  const Tensor &query = qkv[0], &key = qkv[1], &value = qkv[2];
  Args a{};
  a.batch = query.size(0), a.heads = query.size(1), a.queries = query.size(2), a.channels = query.size(3);
  a.keys = key.size(2);
  a.query = view_of(query), a.key = view_of(key), a.value = view_of(value);
  a.scale = scalars[0], a.strength = scalars[1], a.limit = scalars[2];
  a.routed = !routing.empty();
  if (a.routed) {
    a.sup_rank = routing[0].size(2), a.del_rank = routing[2].size(2), a.gate_rank = routing[4].size(2);
    a.sup_q = view_of(routing[0]), a.sup_k = view_of(routing[1]), a.del_q = view_of(routing[2]);
    a.del_k = view_of(routing[3]), a.gate_q = view_of(routing[4]), a.gate_k = view_of(routing[5]);
  }
  if (routing.size() > 6) {
    const View given = view_of(routing[6]);
    const auto number = [&](int64_t i) {
      return given.dtype == DType::float64 ? static_cast<const double*>(given.data)[i]
                                           : static_cast<const float*>(given.data)[i];
    };
    a.strength = number(0), a.limit = number(1);
  }
  a.attn_mask = view_of(attn_mask);
  a.key_ranges = view_of(key_ranges);
  a.output = view_of(outputs[0]), a.lse = view_of(outputs[1]);
  a.parallel =
      torch_threads(a.batch * a.queries * a.keys * (a.heads * a.channels + a.sup_rank + a.del_rank) / (1 << 17));
  return a;
}

}  // namespace

void forward(
    const Tensors& qkv, const Tensors& routing, const MaybeTensor& attn_mask, const MaybeTensor& key_ranges,
    const Numbers& scalars, const Tensors& outputs) {
  Args a = arguments(qkv, routing, attn_mask, key_ranges, scalars, outputs);
  RK_RUN(forward, a);
}

// grads: of query, key, value, of the six factors, and the rows [B, N] of the strength's.
void backward(
    const Tensor& grad_output, const Tensors& outputs, const Tensors& qkv, const Tensors& routing,
    const MaybeTensor& attn_mask, const MaybeTensor& key_ranges, const Numbers& scalars, const Tensors& grads) {
  Args a = arguments(qkv, routing, attn_mask, key_ranges, scalars, outputs);
  Gradients& grad = a.grad;
  grad.output = view_of(grad_output);
  grad.query = view_of(grads[0]), grad.key = view_of(grads[1]), grad.value = view_of(grads[2]);
  if (a.routed) {
    grad.sup_q = view_of(grads[3]), grad.sup_k = view_of(grads[4]), grad.del_q = view_of(grads[5]);
    grad.del_k = view_of(grads[6]), grad.gate_q = view_of(grads[7]), grad.gate_k = view_of(grads[8]);
  }
  if (grads.size() > 9) grad.strength = view_of(grads[9]);
  RK_RUN(backward, a);
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) {
  m.impl("routed_attention_forward", TORCH_BOX(&forward));
  m.impl("routed_attention_backward", TORCH_BOX(&backward));
}

}  // namespace rk::routed_attention
