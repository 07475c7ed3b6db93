#pragma once
#include "../common/stable_tensor.h"

namespace rk::sigmoid_focal_loss {

void forward(
    const Tensor& logits, const Tensor& targets, double alpha, double gamma, double scale, const Tensor& loss,
    const MaybeTensor& grad);

void backward(const Tensor& grad_output, const Tensor& grad, double scale, const Tensors& grads);

}  // namespace rk::sigmoid_focal_loss
