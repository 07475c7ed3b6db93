#pragma once
#include "../common/stable_tensor.h"

namespace rk::routed_attention {

using MaybeTensor = std::optional<Tensor>;

void forward(
    Tensor query, Tensor key, Tensor value, MaybeTensor sup_q, MaybeTensor sup_k, MaybeTensor del_q, MaybeTensor del_k,
    MaybeTensor gate_q, MaybeTensor gate_k, std::optional<double> limit, MaybeTensor attn_mask, MaybeTensor key_ranges,
    double scale, Tensor output, Tensor lse);

void backward(
    Tensor grad_output, Tensor output, Tensor lse, Tensor query, Tensor key, Tensor value, MaybeTensor sup_q,
    MaybeTensor sup_k, MaybeTensor del_q, MaybeTensor del_k, MaybeTensor gate_q, MaybeTensor gate_k,
    std::optional<double> limit, MaybeTensor attn_mask, MaybeTensor key_ranges, double scale, Tensor grad_query,
    Tensor grad_key, Tensor grad_value, MaybeTensor grad_sup_q, MaybeTensor grad_sup_k, MaybeTensor grad_del_q,
    MaybeTensor grad_del_k, MaybeTensor grad_gate_q, MaybeTensor grad_gate_k);

}  // namespace rk::routed_attention
