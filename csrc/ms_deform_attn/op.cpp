#include "op.h"

#include "args.h"

namespace rk::ms_deform_attn {
namespace {

using Ints = std::vector<int64_t>;

// What both ops have; `points` must outlive the result.
Args arguments(
    const Tensor& value, const Ints& spatial_shapes, const Ints& starts, const Ints& points, const Tensor& places,
    const Tensor& weights) {
  Args a{};
  a.B = value.size(0), a.S = value.size(1), a.H = value.size(2), a.D = value.size(3);
  a.N = weights.size(1), a.K = weights.size(3), a.L = int64_t(starts.size());
  a.spatial_shapes = spatial_shapes.data(), a.starts = starts.data(), a.points = points.data();
  a.value = view_of(value), a.places = view_of(places), a.weights = view_of(weights);
  a.parallel = torch_threads(a.B * a.H * a.N / 16);
  return a;
}

Args fused_arguments(
    const Tensor& value, const Ints& spatial_shapes, const Ints& starts, const Tensor& reference_points,
    const Tensor& offsets, const Tensor& logits, const Ints& points, const std::optional<Tensor>& value_mask) {
  Args a = arguments(value, spatial_shapes, starts, points, offsets, logits);
  a.fused = true;
  a.value_mask = view_of(value_mask);
  a.reference = view_of(reference_points);
  a.reference_levels = reference_points.size(2), a.reference_size = reference_points.size(3);
  return a;
}

void forward(Args& a, const Tensor& output) {
  a.output = view_of(output);
  RK_RUN(forward, a);
}

void backward(
    Args& a, const Tensor& grad_output, const Tensor& grad_value, const Tensor& grad_places,
    const Tensor& grad_weights) {
  a.grad_output = view_of(grad_output);
  a.grad_value = view_of(grad_value), a.grad_places = view_of(grad_places), a.grad_weights = view_of(grad_weights);
  RK_RUN(backward, a);
}

}  // namespace

void forward(
    Tensor value, Ints spatial_shapes, Ints starts, Tensor locations, Tensor weights, Ints points, Tensor output) {
  Args a = arguments(value, spatial_shapes, starts, points, locations, weights);
  forward(a, output);
}

void backward(
    Tensor grad_output, Tensor value, Ints spatial_shapes, Ints starts, Tensor locations, Tensor weights, Ints points,
    Tensor grad_value, Tensor grad_locations, Tensor grad_weights, bool /* deterministic: it always is */) {
  Args a = arguments(value, spatial_shapes, starts, points, locations, weights);
  backward(a, grad_output, grad_value, grad_locations, grad_weights);
}

void fused_forward(
    Tensor value, Ints spatial_shapes, Ints starts, Tensor reference_points, Tensor offsets, Tensor logits, Ints points,
    std::optional<Tensor> value_mask, Tensor output) {
  Args a = fused_arguments(value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask);
  forward(a, output);
}

void fused_backward(
    Tensor grad_output, Tensor value, Ints spatial_shapes, Ints starts, Tensor reference_points, Tensor offsets,
    Tensor logits, Ints points, std::optional<Tensor> value_mask, Tensor grad_value,
    std::optional<Tensor> grad_reference, Tensor grad_offsets, Tensor grad_logits,
    bool /* deterministic: it always is */) {
  Args a = fused_arguments(value, spatial_shapes, starts, reference_points, offsets, logits, points, value_mask);
  a.grad_reference = view_of(grad_reference);
  backward(a, grad_output, grad_value, grad_offsets, grad_logits);
}

}  // namespace rk::ms_deform_attn
