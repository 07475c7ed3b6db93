#pragma once
#include "../common/stable_tensor.h"

namespace rk {

void sigmoid_focal_loss_forward(
    Tensor logits, Tensor targets, double alpha, double gamma, double scale, Tensor loss, std::optional<Tensor> grad);

void sigmoid_focal_loss_backward(Tensor grad_loss, Tensor grad, double scale, Tensor grad_logits);

}  // namespace rk
