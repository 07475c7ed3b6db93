// The kernels of the CUDA library; their schemas are in registration.cpp, in the library that is loaded first.

#include <cuda_runtime_api.h>

#include "common/stable_tensor.h"
#include "ms_deform_attn/op.h"

namespace rk {

std::string cuda_build() { return RK_CUDA_BUILD; }

// The newest CUDA that the driver runs, 13020 for 13.2, or 0 without a driver.
int64_t cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&rk::cuda_build));
  m.impl("cuda_driver", TORCH_BOX(&rk::cuda_driver));
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CUDA, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&rk::ms_deform_attn::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&rk::ms_deform_attn::backward));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&rk::ms_deform_attn::fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&rk::ms_deform_attn::fused_backward));
}
