#pragma once
#include "../common/stable_tensor.h"

namespace rk::add_layer_norm {

void forward(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, const Tensor& channels,
    double eps, const Tensor& output, const Tensor& rstd, const Tensor& normalized);

void backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& rstd, const Tensor& normalized,
    const Tensor& channels, const Tensor& weight, const Tensor& bias, const Tensors& grads);

}  // namespace rk::add_layer_norm
