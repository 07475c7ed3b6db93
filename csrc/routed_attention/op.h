#pragma once
#include "../common/stable_tensor.h"

namespace rk::routed_attention {

void forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensors& routing, const MaybeTensor& attn_mask,
    const MaybeTensor& key_ranges, const Numbers& scalars, const Tensor& output, const Tensor& lse);

void backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensors& routing, const MaybeTensor& attn_mask, const MaybeTensor& key_ranges,
    const Numbers& scalars, const Tensors& grads);

}  // namespace rk::routed_attention
