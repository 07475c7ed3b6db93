// Every native kernel's schema on one screen: inputs, then outputs, which the callers in route_kernels/ops allocate, as
// they check every shape and dtype; what travels together is one list: qkv, routing, outputs, grads. Triton's entry
// points take the same arguments. Each op.cpp registers its kernels, registration_cuda.cpp those of the CUDA library.

#include "common/stable_tensor.h"

STABLE_TORCH_LIBRARY(route_kernels_native, m) {
  m.def("simd_level() -> str");
  m.def("cuda_build() -> str");
  m.def("cuda_driver() -> int");
  m.def(
      "routed_attention_forward(Tensor[] qkv, Tensor[] routing, Tensor? attn_mask, Tensor? key_ranges, "
      "float[] scalars, Tensor(a!)[] outputs) -> ()");
  m.def(
      "routed_attention_backward(Tensor grad_output, Tensor[] outputs, Tensor[] qkv, Tensor[] routing, "
      "Tensor? attn_mask, Tensor? key_ranges, float[] scalars, Tensor(a!)[] grads) -> ()");
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
      "Tensor(a!)[] outputs) -> ()");
  m.def(
      "add_layer_norm_backward(Tensor grad_output, Tensor[] outputs, Tensor channels, Tensor weight, Tensor bias, "
      "Tensor(a!)[] grads) -> ()");
  m.def(
      "sigmoid_focal_loss_forward(Tensor logits, Tensor targets, float alpha, float gamma, float scale, "
      "Tensor(a!) loss, Tensor(b!)? grad) -> ()");
  m.def("sigmoid_focal_loss_backward(Tensor grad_output, Tensor grad, float scale, Tensor(a!)[] grads) -> ()");
  m.def(
      "matching_cost_forward(Tensor logits, Tensor? lse, Tensor boxes, Tensor true_boxes, Tensor labels, "
      "int[] counts, float[] scalars, Tensor(a!) output) -> ()");
  m.def("box_loss_forward(Tensor boxes, Tensor true_boxes, Tensor target, float[] weights, Tensor(a!) output) -> ()");
  m.def(
      "box_loss_backward(Tensor grad_output, Tensor boxes, Tensor true_boxes, Tensor target, float[] weights, "
      "Tensor(a!)[] grads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&rk::simd_level_string));
}
