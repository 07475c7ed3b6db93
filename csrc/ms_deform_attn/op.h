#pragma once
// op.cpp defines these for the CPU library and cuda_op.cpp for the CUDA library. Sums are made in a fixed order by the
// former always, by the latter where `deterministic`.
//
// levels: (h_1, w_1, ..., h_L, w_L, start_1, ..., start_L, points_1, ..., points_L)

#include "../common/stable_tensor.h"

namespace rk::ms_deform_attn {

void forward(
    const Tensor& value, const Ints& levels, const Tensor& locations, const Tensor& weights, const Tensor& output);

void backward(
    const Tensor& grad_output, const Tensor& value, const Ints& levels, const Tensor& locations, const Tensor& weights,
    bool deterministic, const Tensors& grads);

void fused_forward(
    const Tensor& value, const Ints& levels, const Tensor& reference_points, const Tensor& offsets,
    const Tensor& logits, const MaybeTensor& value_mask, const Tensor& output);

void fused_backward(
    const Tensor& grad_output, const Tensor& value, const Ints& levels, const Tensor& reference_points,
    const Tensor& offsets, const Tensor& logits, const MaybeTensor& value_mask, bool deterministic,
    const Tensors& grads);

}  // namespace rk::ms_deform_attn
