#include "op.h"

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
    Tensor logits, Tensor targets, double alpha, double gamma, double scale, Tensor loss, std::optional<Tensor> grad) {
  Args a = arguments(logits, scale);
  a.alpha = alpha, a.gamma = gamma;
  a.logits = view_of(logits), a.loss = view_of(loss), a.grad = view_of(grad);
  a.targets = static_cast<const int64_t*>(targets.data_ptr());
  RK_RUN(forward, a);
}

void backward(Tensor grad_loss, Tensor grad, double scale, Tensor grad_logits) {
  Args a = arguments(grad, scale);
  a.grad_loss = view_of(grad_loss), a.grad = view_of(grad), a.grad_logits = view_of(grad_logits);
  RK_RUN(backward, a);
}

}  // namespace rk::sigmoid_focal_loss
