#pragma once
// Where a CUDA kernel is launched: the device of a tensor made current, and PyTorch's current stream there.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "stable_tensor.h"

// Weak: a PyTorch without CUDA loads the library too, and has no tensor to launch a kernel for.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace rk {

class CudaStream {
 public:
  explicit CudaStream(const Tensor& tensor) : device_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard device_;  // current until the end of the scope
  cudaStream_t stream_;
};

// `error` is the result of a launch.
inline void expect_launched(int error) {
  STD_TORCH_CHECK(
      error == cudaSuccess,
      "route_kernels: a CUDA kernel was not launched: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace rk
