// The host half of the CUDA kernels, csrc/ms_deform_attn/cuda_op.cpp, over the emulation: PyTorch's CPU tensors as if
// they were on a device, every launch with the memory that its arguments describe.

#define launch_forward emulated_forward
#define launch_backward emulated_backward
#define launch_gather emulated_gather
#include "../../csrc/ms_deform_attn/launch.cuh"
#undef launch_forward
#undef launch_backward
#undef launch_gather

#include <list>
#include <vector>

#include "../../csrc/ms_deform_attn/op.h"

// ---- PyTorch's devices and streams -------------------------------------------------------------------------------

extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return TORCH_SUCCESS; }
__attribute__((visibility("default"))) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  static CUstream_st current;
  *stream = &current;
  return TORCH_SUCCESS;
}
}

namespace rk::ms_deform_attn {
namespace {

// ---- the memory of a launch --------------------------------------------------------------------------------------

using Shape = std::vector<int64_t>;

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    case DType::boolean: return 1;
    default: return 2;
  }
}

// One launch's arguments, at addresses of the emulation.
class Launch {
 public:
  explicit Launch(const DeviceArgs& given) : args(given) {}
  DeviceArgs args;

  // Contiguous where `strided` is false, whatever the strides say.
  void place(const char* name, View& view, const Shape& shape, simt::Access access, bool strided = true) {
    int64_t count = 1, last = 0;
    for (size_t d = 0; d < shape.size(); ++d) {
      count *= shape[d];
      last += (shape[d] - 1) * view.stride[d];
    }
    if (view.data == nullptr) return;
    const int64_t bytes = (count == 0 ? 0 : strided ? last + 1 : count) * bytes_of(view.dtype);
    all.emplace_back(size_t(bytes), uint8_t(1));
    view.data = stream.memory.add(name, view.data, bytes, all.back().data(), access);
  }

  template <typename Enqueue>
  int run(const Enqueue& enqueue) {
    const int status = enqueue(args, &stream);
    if (status == cudaSuccess && stream.launches > 0) stream.memory.check_outputs_are_complete();
    return status;
  }

 private:
  CUstream_st stream;
  std::list<std::vector<uint8_t>> all;
};

void place_inputs(Launch& launch) {
  DeviceArgs& a = launch.args;
  const simt::Access input = simt::Access::input;
  launch.place("value", a.value, {a.B, a.S, a.H, a.D}, input);
  launch.place("value_mask", a.value_mask, {a.B, a.S}, input);
  launch.place("places", a.places, {a.B, a.N, a.H, a.K, 2}, input);
  launch.place("weights", a.weights, {a.B, a.N, a.H, a.K}, input);
  launch.place("reference", a.reference, {a.B, a.N, a.reference_levels, a.reference_size}, input);
  launch.place("grad_output", a.grad_output, {a.B, a.N, a.H * a.D}, input);
}

}  // namespace

// ---- launches ----------------------------------------------------------------------------------------------------

template <DType STORAGE>
int launch_forward(const DeviceArgs& given, CUstream_st*) {
  Launch launch(given);
  DeviceArgs& a = launch.args;
  place_inputs(launch);
  launch.place("output", a.output, {a.B, a.N, a.H * a.D}, simt::Access::output);
  return launch.run(emulated_forward<STORAGE>);
}

template <DType STORAGE>
int launch_backward(const DeviceArgs& given, CUstream_st*) {
  Launch launch(given);
  DeviceArgs& a = launch.args;
  const simt::Access output = simt::Access::output;
  place_inputs(launch);
  launch.place("grad_places", a.grad_places, {a.B, a.N, a.H, a.K, 2}, output, false);
  launch.place("grad_weights", a.grad_weights, {a.B, a.N, a.H, a.K}, output, false);
  launch.place("grad_reference", a.grad_reference, {a.B, a.N, a.H, a.L, a.reference_size}, output, false);
  launch.place("grad_value_sums", a.grad_value_sums, {a.B, a.S, a.H, a.D}, simt::Access::sums, false);
  launch.place("cell", a.cell, {a.B, a.N, a.H, a.K}, output, false);
  launch.place("corner_weight", a.corner_weight, {a.B, a.N, a.H, a.K, 4}, output, false);
  return launch.run(emulated_backward<STORAGE>);
}

template <DType STORAGE>
int launch_gather(const DeviceArgs& given, CUstream_st*) {
  Launch launch(given);
  DeviceArgs& a = launch.args;
  const simt::Access input = simt::Access::input;
  place_inputs(launch);
  launch.place("corner_weight", a.corner_weight, {a.B, a.N, a.H, a.K, 4}, input, false);
  launch.place("order", a.order, {a.B * a.N * a.H * a.K}, input, false);
  launch.place("bounds", a.bounds, {a.B * a.H * a.cells + 1}, input, false);
  launch.place("grad_value", a.grad_value, {a.B, a.S, a.H, a.D}, simt::Access::output, false);
  return launch.run(emulated_gather<STORAGE>);
}

#define RK_EMULATED(STORAGE)                                                     \
  template int launch_forward<DType::STORAGE>(const DeviceArgs&, CUstream_st*);  \
  template int launch_backward<DType::STORAGE>(const DeviceArgs&, CUstream_st*); \
  template int launch_gather<DType::STORAGE>(const DeviceArgs&, CUstream_st*);
RK_EMULATED(float64)
RK_EMULATED(float32)
RK_EMULATED(float16)
RK_EMULATED(bfloat16)

}  // namespace rk::ms_deform_attn

STABLE_TORCH_LIBRARY_IMPL(route_kernels_emulated, CPU, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&rk::ms_deform_attn::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&rk::ms_deform_attn::backward));
  m.impl("ms_deform_attn_fused_forward", TORCH_BOX(&rk::ms_deform_attn::fused_forward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&rk::ms_deform_attn::fused_backward));
}
