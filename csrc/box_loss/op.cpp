#include "../common/stable_tensor.h"
#include "args.h"

namespace rk::box_loss {
namespace {

Args arguments(const Tensor& boxes, const Tensor& true_boxes, const Tensor& target, const Numbers& weights) {
  Args a{};
  a.M = boxes.size(0), a.T = true_boxes.size(0);
  a.l1_weight = weights[0], a.giou_weight = weights[1];
  a.boxes = view_of(boxes), a.true_boxes = true_boxes.data_ptr();
  a.target = static_cast<const int64_t*>(target.data_ptr());
  a.parallel = torch_threads(a.M / 4096);
  return a;
}

}  // namespace

void forward(
    const Tensor& boxes, const Tensor& true_boxes, const Tensor& target, const Numbers& weights, const Tensor& output) {
  Args a = arguments(boxes, true_boxes, target, weights);
  a.output = view_of(output);
  RK_RUN(forward, a);
}

void backward(
    const Tensor& grad_output, const Tensor& boxes, const Tensor& true_boxes, const Tensor& target,
    const Numbers& weights, const Tensors& grads) {
  Args a = arguments(boxes, true_boxes, target, weights);
  a.grad_output = view_of(grad_output), a.grad_boxes = view_of(grads[0]);
  RK_RUN(backward, a);
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) {
  m.impl("box_loss_forward", TORCH_BOX(&forward));
  m.impl("box_loss_backward", TORCH_BOX(&backward));
}

}  // namespace rk::box_loss
