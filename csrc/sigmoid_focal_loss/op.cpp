#include "op.h"

#include "args.h"

namespace rk {
namespace {

SigmoidFocalLoss arguments(const Tensor& of_classes, double scale) {
  SigmoidFocalLoss a{};
  a.T = of_classes.size(0), a.K = of_classes.size(1), a.scale = scale;
  a.parallel = torch_threads(a.T * a.K / 4096);
  return a;
}

}  // namespace

void sigmoid_focal_loss_forward(
    Tensor logits, Tensor targets, double alpha, double gamma, double scale, Tensor loss, std::optional<Tensor> grad) {
  SigmoidFocalLoss a = arguments(logits, scale);
  a.alpha = alpha, a.gamma = gamma;
  a.logits = view_of(logits), a.loss = view_of(loss), a.grad = view_of(grad);
  a.targets = static_cast<const int64_t*>(targets.data_ptr());
  const Tensor scratch = workspace(RK_CALL_LEVEL(sigmoid_focal_loss_workspace, a));
  a.workspace = static_cast<char*>(scratch.data_ptr());
  RK_CALL_LEVEL(sigmoid_focal_loss_forward, a);
}

void sigmoid_focal_loss_backward(Tensor grad_loss, Tensor grad, double scale, Tensor grad_logits) {
  SigmoidFocalLoss a = arguments(grad, scale);
  a.grad_loss = view_of(grad_loss), a.grad = view_of(grad), a.grad_logits = view_of(grad_logits);
  RK_CALL_LEVEL(sigmoid_focal_loss_backward, a);
}

}  // namespace rk
