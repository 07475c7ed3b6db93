#include "op.h"

#include "args.h"

namespace rk::routed_attention {
namespace {

Args arguments(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& sup_q, const MaybeTensor& sup_k,
    const MaybeTensor& del_q, const MaybeTensor& del_k, const MaybeTensor& gate_q, const MaybeTensor& gate_k,
    std::optional<double> limit, const MaybeTensor& attn_mask, const MaybeTensor& key_ranges, double scale,
    const Tensor& output, const Tensor& lse) {
  Args a{};
  a.batch = query.size(0), a.heads = query.size(1), a.queries = query.size(2), a.channels = query.size(3);
  a.keys = key.size(2);
  a.routed = sup_q.has_value();
  if (a.routed) a.sup_rank = sup_q->size(2), a.del_rank = del_q->size(2), a.gate_rank = gate_q->size(2);
  a.clamped = a.routed && limit.has_value();
  a.limit = limit.value_or(0), a.scale = scale;
  a.query = view_of(query), a.key = view_of(key), a.value = view_of(value);
  a.sup_q = view_of(sup_q), a.sup_k = view_of(sup_k), a.del_q = view_of(del_q), a.del_k = view_of(del_k);
  a.gate_q = view_of(gate_q), a.gate_k = view_of(gate_k);
  a.attn_mask = view_of(attn_mask);
  a.key_ranges = view_of(key_ranges);
  a.output = view_of(output), a.lse = view_of(lse);
  a.parallel =
      torch_threads(a.batch * a.queries * a.keys * (a.heads * a.channels + a.sup_rank + a.del_rank) / (1 << 17));
  return a;
}

}  // namespace

void forward(
    Tensor query, Tensor key, Tensor value, MaybeTensor sup_q, MaybeTensor sup_k, MaybeTensor del_q, MaybeTensor del_k,
    MaybeTensor gate_q, MaybeTensor gate_k, std::optional<double> limit, MaybeTensor attn_mask, MaybeTensor key_ranges,
    double scale, Tensor output, Tensor lse) {
  Args a = arguments(
      query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit, attn_mask, key_ranges, scale, output, lse);
  RK_RUN(forward, a);
}

void backward(
    Tensor grad_output, Tensor output, Tensor lse, Tensor query, Tensor key, Tensor value, MaybeTensor sup_q,
    MaybeTensor sup_k, MaybeTensor del_q, MaybeTensor del_k, MaybeTensor gate_q, MaybeTensor gate_k,
    std::optional<double> limit, MaybeTensor attn_mask, MaybeTensor key_ranges, double scale, Tensor grad_query,
    Tensor grad_key, Tensor grad_value, MaybeTensor grad_sup_q, MaybeTensor grad_sup_k, MaybeTensor grad_del_q,
    MaybeTensor grad_del_k, MaybeTensor grad_gate_q, MaybeTensor grad_gate_k) {
  Args a = arguments(
      query, key, value, sup_q, sup_k, del_q, del_k, gate_q, gate_k, limit, attn_mask, key_ranges, scale, output, lse);
  Gradients& grad = a.grad;
  grad.output = view_of(grad_output);
  grad.query = view_of(grad_query), grad.key = view_of(grad_key), grad.value = view_of(grad_value);
  grad.sup_q = view_of(grad_sup_q), grad.sup_k = view_of(grad_sup_k), grad.del_q = view_of(grad_del_q);
  grad.del_k = view_of(grad_del_k), grad.gate_q = view_of(grad_gate_q), grad.gate_k = view_of(grad_gate_k);
  RK_RUN(backward, a);
}

}  // namespace rk::routed_attention
