#pragma once
// What op.cpp defines in the CPU library and cuda_op.cpp in the CUDA library. Sums are made in a fixed order by the
// former always, by the latter where `deterministic`.

#include "../common/stable_tensor.h"

namespace rk::ms_deform_attn {

void forward(
    Tensor value, std::vector<int64_t> spatial_shapes, std::vector<int64_t> starts, Tensor locations, Tensor weights,
    std::vector<int64_t> points, Tensor output);

void backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> spatial_shapes, std::vector<int64_t> starts,
    Tensor locations, Tensor weights, std::vector<int64_t> points, Tensor grad_value, Tensor grad_locations,
    Tensor grad_weights, bool deterministic);

void fused_forward(
    Tensor value, std::vector<int64_t> spatial_shapes, std::vector<int64_t> starts, Tensor reference_points,
    Tensor offsets, Tensor logits, std::vector<int64_t> points, std::optional<Tensor> value_mask, Tensor output);

void fused_backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> spatial_shapes, std::vector<int64_t> starts,
    Tensor reference_points, Tensor offsets, Tensor logits, std::vector<int64_t> points,
    std::optional<Tensor> value_mask, Tensor grad_value, std::optional<Tensor> grad_reference, Tensor grad_offsets,
    Tensor grad_logits, bool deterministic);

}  // namespace rk::ms_deform_attn
