// Every native kernel's schema on one screen: inputs, then outputs, which the callers in route_kernels/ops allocate, as
// they check every shape and dtype; what backward writes is one list, `grads`. Triton's entry points take the same
// arguments. The CPU's kernels are registered below, those of the CUDA library in registration_cuda.cpp.

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
      "routed_attention_forward(Tensor query, Tensor key, Tensor value, Tensor[] routing, Tensor? attn_mask, "
      "Tensor? key_ranges, float[] scalars, Tensor(a!) output, Tensor(b!) lse) -> ()");
  m.def(
      "routed_attention_backward(Tensor grad_output, Tensor output, Tensor lse, Tensor query, Tensor key, "
      "Tensor value, Tensor[] routing, Tensor? attn_mask, Tensor? key_ranges, float[] scalars, "
      "Tensor(a!)[] grads) -> ()");
  m.def("query_similarity_forward(Tensor x, Tensor(a!) output) -> ()");
  m.def(
      "ms_deform_attn_forward(Tensor value, int[] levels, Tensor locations, Tensor weights, Tensor(a!) output) -> ()");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, int[] levels, Tensor locations, Tensor weights, "
      "bool deterministic, Tensor(a!)[] grads) -> ()");
  m.def(
      "ms_deform_attn_fused_forward(Tensor value, int[] levels, Tensor reference_points, Tensor offsets, "
      "Tensor logits, Tensor? value_mask, Tensor(a!) output) -> ()");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, int[] levels, Tensor reference_points, "
      "Tensor offsets, Tensor logits, Tensor? value_mask, bool deterministic, Tensor(a!)[] grads) -> ()");
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor channels, float eps, "
      "Tensor(a!) output, Tensor(b!) rstd, Tensor(c!) normalized) -> ()");
  m.def(
      "add_layer_norm_backward(Tensor grad_output, Tensor output, Tensor rstd, Tensor normalized, Tensor channels, "
      "Tensor weight, Tensor bias, Tensor(a!)[] grads) -> ()");
  m.def(
      "sigmoid_focal_loss_forward(Tensor logits, Tensor targets, float alpha, float gamma, float scale, "
      "Tensor(a!) loss, Tensor(b!)? grad) -> ()");
  m.def("sigmoid_focal_loss_backward(Tensor grad_output, Tensor grad, float scale, Tensor(a!)[] grads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&rk::simd_level_string));
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) {
  m.impl("routed_attention_forward", TORCH_BOX(&rk::routed_attention::forward));
  m.impl("routed_attention_backward", TORCH_BOX(&rk::routed_attention::backward));
  m.impl("query_similarity_forward", TORCH_BOX(&rk::query_similarity::forward));
  m.impl("ms_deform_attn_forward", TORCH_BOX(&rk::ms_deform_attn::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&rk::ms_deform_attn::backward));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&rk::ms_deform_attn::fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&rk::ms_deform_attn::fused_backward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&rk::add_layer_norm::forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&rk::add_layer_norm::backward));
  m.impl("sigmoid_focal_loss_forward", TORCH_BOX(&rk::sigmoid_focal_loss::forward));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&rk::sigmoid_focal_loss::backward));
}
