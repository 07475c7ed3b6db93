#pragma once
#include "../common/stable_tensor.h"

namespace rk::add_layer_norm {

void forward(
    Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps, Tensor channels, Tensor output, Tensor rstd,
    Tensor normalized);

void backward(
    Tensor grad_output, Tensor output, Tensor rstd, Tensor normalized, Tensor channels, Tensor weight, Tensor bias,
    Tensor grad_sum, Tensor sums);

}  // namespace rk::add_layer_norm
