#pragma once
#include "../common/stable_tensor.h"

namespace rk::sigmoid_focal_loss {

void forward(
    Tensor logits, Tensor targets, double alpha, double gamma, double scale, Tensor loss, std::optional<Tensor> grad);

void backward(Tensor grad_loss, Tensor grad, double scale, Tensor grad_logits);

}  // namespace rk::sigmoid_focal_loss
