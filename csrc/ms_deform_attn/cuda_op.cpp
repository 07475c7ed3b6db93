// op.h for tensors of a CUDA device: plain structs of them, and the launches. Nothing here waits for the device.

#include <array>
#include <type_traits>

#include "../common/cuda_stream.h"
#include "../common/stable_order.h"
#include "launch.h"
#include "op.h"

namespace rk::ms_deform_attn {
namespace {

using torch::headeronly::ScalarType;

int64_t at_most(int64_t most, const char* name, int64_t size) {
  STD_TORCH_CHECK(size <= most, "ms_deform_attn: the CUDA kernel takes at most ", most, " ", name, ", got ", size);
  return size;
}

// The arguments that both ops have.
DeviceArgs arguments(const Tensor& value, const Ints& levels, const Tensor& places, const Tensor& weights) {
  DeviceArgs a{};
  a.B = value.size(0), a.H = value.size(2), a.D = value.size(3), a.N = weights.size(1);
  a.S = at_most(MAX_POSITIONS, "feature positions", value.size(1));
  a.K = at_most(MAX_POINTS, "points of a query and head", weights.size(3));
  a.L = at_most(MAX_LEVELS, "levels", int64_t(levels.size()) / 4);
  const int64_t *starts = levels.data() + 2 * a.L, *points = levels.data() + 3 * a.L;
  int64_t point = 0;
  for (int64_t l = 0; l < a.L; ++l) {
    const int64_t height = levels[2 * l], width = levels[2 * l + 1];
    a.levels[l] = {starts[l], int32_t(height), int32_t(width), int32_t(point), int32_t(points[l])};
    a.cells += (height + 1) * (width + 1);
    point += points[l];
  }
  a.cells += 1;  // for points that are nowhere
  a.value = view_of(value), a.places = view_of(places), a.weights = view_of(weights);
  return a;
}

DeviceArgs fused_arguments(
    const Tensor& value, const Ints& levels, const Tensor& reference_points, const Tensor& offsets,
    const Tensor& logits, const MaybeTensor& value_mask) {
  DeviceArgs a = arguments(value, levels, offsets, logits);
  a.fused = true;
  a.value_mask = view_of(value_mask);
  a.reference = view_of(reference_points);
  a.reference_levels = reference_points.size(2), a.reference_size = reference_points.size(3);
  return a;
}

// Launches what `launch` names for a storage type: launch(std::integral_constant<DType, ...>) gives a cudaError_t.
template <typename Launch>
void launch_for(DType storage, const Launch& launch) {
  switch (storage) {
    case DType::float64: return expect_launched(launch(std::integral_constant<DType, DType::float64>{}));
    case DType::float32: return expect_launched(launch(std::integral_constant<DType, DType::float32>{}));
    case DType::float16: return expect_launched(launch(std::integral_constant<DType, DType::float16>{}));
    case DType::bfloat16: return expect_launched(launch(std::integral_constant<DType, DType::bfloat16>{}));
    default: STD_TORCH_CHECK(false, "ms_deform_attn: the CUDA kernel takes no value of this dtype");
  }
}

void forward(DeviceArgs& a, const Tensor& value, const Tensor& output) {
  const CudaStream stream(value);
  a.output = view_of(output);
  launch_for(a.value.dtype, [&](auto storage) { return launch_forward<storage.value>(a, stream); });
}

ScalarType accumulate_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_on_device_of(const Tensor& value, const Ints& sizes, ScalarType dtype) {
  return torch::stable::new_empty(value, sizes, dtype);
}

void enqueue_backward(const DeviceArgs& a, cudaStream_t stream) {
  launch_for(a.value.dtype, [&](auto storage) { return launch_backward<storage.value>(a, stream); });
}

// Into grad_value itself where it has the dtype that is added in.
void backward_by_atomics(DeviceArgs& a, const Tensor& value, Tensor grad_value, cudaStream_t stream) {
  const bool in_place = value.scalar_type() == accumulate_type(value);
  const Tensor sums = in_place ? torch::stable::zero_(grad_value)
                               : torch::stable::new_zeros(value, value.sizes(), accumulate_type(value));
  a.grad_value_sums = view_of(sums);
  enqueue_backward(a, stream);
  if (!in_place) torch::stable::copy_(grad_value, sums);
}

// Each element of the gradient of value is summed by one thread, over points in the order of their cells.
void backward_in_order(DeviceArgs& a, const Tensor& value, Tensor grad_value, cudaStream_t stream) {
  const int64_t cells = a.B * a.H * a.cells;
  const ScalarType index = cells <= INT32_MAX ? ScalarType::Int : ScalarType::Long;
  Tensor cell = empty_on_device_of(value, {a.B, a.N, a.H, a.K}, index);
  const Tensor corner_weight = empty_on_device_of(value, {a.B, a.N, a.H, a.K, 4}, accumulate_type(value));
  a.cell = view_of(cell), a.corner_weight = view_of(corner_weight);
  enqueue_backward(a, stream);
  const Ordered ordered = ordered_by(torch::stable::flatten(cell), cells);
  a.order = view_of(ordered.order), a.bounds = view_of(ordered.bounds), a.grad_value = view_of(grad_value);
  launch_for(a.value.dtype, [&](auto storage) { return launch_gather<storage.value>(a, stream); });
}

void backward(DeviceArgs& a, const Tensor& grad_output, const Tensor& value, bool deterministic, const Tensors& grads) {
  const CudaStream stream(value);
  a.grad_output = view_of(grad_output);
  a.grad_places = view_of(grads[1]), a.grad_weights = view_of(grads[2]);
  (deterministic ? backward_in_order : backward_by_atomics)(a, value, grads[0], stream);
}

// Over heads and, where all levels share a reference, over levels.
void sum_over_heads(const DeviceArgs& a, const Tensor& of_heads, Tensor grad_reference) {
  const bool shared = a.reference_levels == 1;
  const Tensor sums = torch::stable::sum(of_heads, shared ? Ints{2, 3} : Ints{2});
  torch::stable::copy_(grad_reference, shared ? torch::stable::unsqueeze(sums, 2) : sums);
}

}  // namespace

void forward(
    const Tensor& value, const Ints& levels, const Tensor& locations, const Tensor& weights, const Tensor& output) {
  DeviceArgs a = arguments(value, levels, locations, weights);
  forward(a, value, output);
}

void backward(
    const Tensor& grad_output, const Tensor& value, const Ints& levels, const Tensor& locations, const Tensor& weights,
    bool deterministic, const Tensors& grads) {
  DeviceArgs a = arguments(value, levels, locations, weights);
  backward(a, grad_output, value, deterministic, grads);
}

void fused_forward(
    const Tensor& value, const Ints& levels, const Tensor& reference_points, const Tensor& offsets,
    const Tensor& logits, const MaybeTensor& value_mask, const Tensor& output) {
  DeviceArgs a = fused_arguments(value, levels, reference_points, offsets, logits, value_mask);
  forward(a, value, output);
}

void fused_backward(
    const Tensor& grad_output, const Tensor& value, const Ints& levels, const Tensor& reference_points,
    const Tensor& offsets, const Tensor& logits, const MaybeTensor& value_mask, bool deterministic,
    const Tensors& grads) {
  DeviceArgs a = fused_arguments(value, levels, reference_points, offsets, logits, value_mask);
  MaybeTensor of_heads;  // [B, N, H, L, 2 or 4]
  if (grads.size() > 3)
    of_heads = empty_on_device_of(value, {a.B, a.N, a.H, a.L, a.reference_size}, accumulate_type(value));
  a.grad_reference = view_of(of_heads);
  backward(a, grad_output, value, deterministic, grads);
  if (of_heads.has_value()) sum_over_heads(a, *of_heads, grads[3]);
}

}  // namespace rk::ms_deform_attn
