#include "op.h"

#include "args.h"

namespace rk::ms_deform_attn {
namespace {

// The arguments that both ops have; `levels` must outlive the result.
Args arguments(const Tensor& value, const Ints& levels, const Tensor& places, const Tensor& weights) {
  Args a{};
  a.B = value.size(0), a.S = value.size(1), a.H = value.size(2), a.D = value.size(3);
  a.N = weights.size(1), a.K = weights.size(3), a.L = int64_t(levels.size()) / 4;
  a.spatial_shapes = levels.data(), a.starts = levels.data() + 2 * a.L, a.points = levels.data() + 3 * a.L;
  a.value = view_of(value), a.places = view_of(places), a.weights = view_of(weights);
  a.parallel = torch_threads(a.B * a.H * a.N / 16);
  return a;
}

Args fused_arguments(
    const Tensor& value, const Ints& levels, const Tensor& reference_points, const Tensor& offsets,
    const Tensor& logits, const MaybeTensor& value_mask) {
  Args a = arguments(value, levels, offsets, logits);
  a.fused = true;
  a.value_mask = view_of(value_mask);
  a.reference = view_of(reference_points);
  a.reference_levels = reference_points.size(2), a.reference_size = reference_points.size(3);
  return a;
}

void run_forward(Args& a, const Tensor& output) {
  a.output = view_of(output);
  RK_RUN(forward, a);
}

void run_backward(Args& a, const Tensor& grad_output, const Tensors& grads) {
  a.grad_output = view_of(grad_output);
  a.grad_value = view_of(grads[0]), a.grad_places = view_of(grads[1]), a.grad_weights = view_of(grads[2]);
  if (grads.size() > 3) a.grad_reference = view_of(grads[3]);
  RK_RUN(backward, a);
}

}  // namespace

void forward(
    const Tensor& value, const Ints& levels, const Tensor& locations, const Tensor& weights, const Tensor& output) {
  Args a = arguments(value, levels, locations, weights);
  run_forward(a, output);
}

void backward(
    const Tensor& grad_output, const Tensor& value, const Ints& levels, const Tensor& locations, const Tensor& weights,
    bool /* deterministic: it always is */, const Tensors& grads) {
  Args a = arguments(value, levels, locations, weights);
  run_backward(a, grad_output, grads);
}

void fused_forward(
    const Tensor& value, const Ints& levels, const Tensor& reference_points, const Tensor& offsets,
    const Tensor& logits, const MaybeTensor& value_mask, const Tensor& output) {
  Args a = fused_arguments(value, levels, reference_points, offsets, logits, value_mask);
  run_forward(a, output);
}

void fused_backward(
    const Tensor& grad_output, const Tensor& value, const Ints& levels, const Tensor& reference_points,
    const Tensor& offsets, const Tensor& logits, const MaybeTensor& value_mask, bool /* deterministic: it always is */,
    const Tensors& grads) {
  Args a = fused_arguments(value, levels, reference_points, offsets, logits, value_mask);
  run_backward(a, grad_output, grads);
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&fused_backward));
}

}  // namespace rk::ms_deform_attn
