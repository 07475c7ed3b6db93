// Every native kernel's schema on one screen. Outputs are allocated by the callers in route_kernels/ops, which also
// check every shape and dtype; what an output is called `grad_x`, it has the shape and dtype of `x`. The CPU's kernels
// are registered below, those of the CUDA library in registration_cuda.cpp.

#include "add_layer_norm/op.h"
#include "common/stable_tensor.h"
#include "ms_deform_attn/op.h"
#include "query_similarity/op.h"
#include "routed_attention/op.h"
#include "sigmoid_focal_loss/op.h"

STABLE_TORCH_LIBRARY(route_kernels_native, m) {
  m.def("simd_level() -> str");
  m.def("cuda_build() -> str");
  m.def("cuda_driver() -> int");
  m.def(
      "routed_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? sup_q, Tensor? sup_k, Tensor? del_q, "
      "Tensor? del_k, Tensor? gate_q, Tensor? gate_k, float? limit, Tensor? attn_mask, Tensor? key_ranges, "
      "float scale, Tensor(a!) output, Tensor(b!) lse) -> ()");
  m.def(
      "routed_attention_backward(Tensor grad_output, Tensor output, Tensor lse, Tensor query, Tensor key, "
      "Tensor value, Tensor? sup_q, Tensor? sup_k, Tensor? del_q, Tensor? del_k, Tensor? gate_q, Tensor? gate_k, "
      "float? limit, Tensor? attn_mask, Tensor? key_ranges, float scale, Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value, Tensor(d!)? grad_sup_q, Tensor(e!)? grad_sup_k, Tensor(f!)? grad_del_q, "
      "Tensor(g!)? grad_del_k, Tensor(h!)? grad_gate_q, Tensor(i!)? grad_gate_k) -> ()");
  m.def("query_similarity_relu(Tensor x, Tensor(a!) output) -> ()");
  m.def(
      "ms_deform_attn_forward(Tensor value, int[] spatial_shapes, int[] starts, Tensor locations, Tensor weights, "
      "int[] points, Tensor(a!) output) -> ()");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, int[] spatial_shapes, int[] starts, "
      "Tensor locations, Tensor weights, int[] points, Tensor(a!) grad_value, Tensor(b!) grad_locations, "
      "Tensor(c!) grad_weights, bool deterministic=False) -> ()");
  m.def(
      "ms_deform_attn_fused_forward(Tensor value, int[] spatial_shapes, int[] starts, Tensor reference_points, "
      "Tensor offsets, Tensor logits, int[] points, Tensor? value_mask, Tensor(a!) output) -> ()");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, int[] spatial_shapes, int[] starts, "
      "Tensor reference_points, Tensor offsets, Tensor logits, int[] points, Tensor? value_mask, "
      "Tensor(a!) grad_value, Tensor(b!)? grad_reference, Tensor(c!) grad_offsets, Tensor(d!) grad_logits, "
      "bool deterministic=False) -> ()");
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor channels, "
      "Tensor(a!) output, Tensor(b!) rstd, Tensor(c!) normalized) -> ()");
  m.def(
      "add_layer_norm_backward(Tensor grad_output, Tensor output, Tensor rstd, Tensor normalized, Tensor channels, "
      "Tensor weight, Tensor bias, Tensor(a!) grad_sum, Tensor(b!) sums) -> ()");
  m.def(
      "sigmoid_focal_loss_forward(Tensor logits, Tensor targets, float alpha, float gamma, float scale, "
      "Tensor(a!) loss, Tensor(b!)? grad) -> ()");
  m.def("sigmoid_focal_loss_backward(Tensor grad_loss, Tensor grad, float scale, Tensor(a!) grad_logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&rk::simd_level_string));
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) {
  m.impl("routed_attention_forward", TORCH_BOX(&rk::routed_attention::forward));
  m.impl("routed_attention_backward", TORCH_BOX(&rk::routed_attention::backward));
  m.impl("query_similarity_relu", TORCH_BOX(&rk::query_similarity::forward));
  m.impl("ms_deform_attn_forward", TORCH_BOX(&rk::ms_deform_attn::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&rk::ms_deform_attn::backward));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&rk::ms_deform_attn::fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&rk::ms_deform_attn::fused_backward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&rk::add_layer_norm::forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&rk::add_layer_norm::backward));
  m.impl("sigmoid_focal_loss_forward", TORCH_BOX(&rk::sigmoid_focal_loss::forward));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&rk::sigmoid_focal_loss::backward));
}
