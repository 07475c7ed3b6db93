#include "../common/stable_tensor.h"
#include "args.h"

namespace rk::sigmoid_focal_loss {
namespace {

Args arguments(const Tensor& of_classes, double scale) {
  Args a{};
  a.T = of_classes.size(0), a.K = of_classes.size(1), a.scale = scale;
  a.parallel = torch_threads(a.T * a.K / 4096);
  return a;
}

}  // namespace

void forward(
    const Tensor& logits, const Tensor& targets, double alpha, double gamma, double scale, const Tensor& loss,
    const MaybeTensor& grad) {
  Args a = arguments(logits, scale);
  a.alpha = alpha, a.gamma = gamma;
  a.logits = view_of(logits), a.loss = view_of(loss), a.grad = view_of(grad);
  a.targets = static_cast<const int64_t*>(targets.data_ptr());
  RK_RUN(forward, a);
}

void backward(const Tensor& grad_output, const Tensor& grad, double scale, const Tensors& grads) {
  Args a = arguments(grad, scale);
  a.grad_loss = view_of(grad_output), a.grad = view_of(grad), a.grad_logits = view_of(grads[0]);
  RK_RUN(backward, a);
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) {
  m.impl("sigmoid_focal_loss_forward", TORCH_BOX(&forward));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&backward));
}

}  // namespace rk::sigmoid_focal_loss
