#include "../common/stable_tensor.h"
#include "args.h"

namespace rk::add_layer_norm {
namespace {

// outputs: output, rstd, normalized.
Args arguments(const Tensors& outputs, const Tensor& channels, const Tensor& weight, const Tensor& bias) {
  const Tensor& output = outputs[0];
  Args a{};
  a.T = output.size(0), a.C = output.size(1), a.kept = channels.size(0);
  a.weight = view_of(weight), a.bias = view_of(bias);
  a.output = view_of(output), a.rstd = view_of(outputs[1]), a.normalized = view_of(outputs[2]);
  a.channels = static_cast<const int32_t*>(channels.data_ptr());
  return a;
}

}  // namespace

void forward(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, const Tensor& channels,
    double eps, const Tensors& outputs) {
  Args a = arguments(outputs, channels, weight, bias);
  a.x = view_of(x), a.residual = view_of(residual), a.eps = eps;
  a.parallel = torch_threads(a.T / 64);
  RK_RUN(forward, a);
}

// grads: of the sum [T, C], and of weight and bias summed over each part of the tokens [parts, 2, C].
void backward(
    const Tensor& grad_output, const Tensors& outputs, const Tensor& channels, const Tensor& weight, const Tensor& bias,
    const Tensors& grads) {
  Args a = arguments(outputs, channels, weight, bias);
  a.grad_output = view_of(grad_output), a.grad_sum = view_of(grads[0]), a.sums = view_of(grads[1]);
  a.parts = grads[1].size(0);
  a.parallel = torch_threads(a.parts);
  RK_RUN(backward, a);
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) {
  m.impl("add_layer_norm_forward", TORCH_BOX(&forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace rk::add_layer_norm
