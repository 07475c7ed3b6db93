// The kernels of csrc/ms_deform_attn over the emulation, for ctypes.

#include "../../csrc/ms_deform_attn/launch.cuh"

using namespace rk;
using namespace rk::ms_deform_attn;

namespace {

struct EmulatedTensor {
  char* storage;  // null: absent
  int64_t bytes, offset;
  const uint8_t* belongs;
  int64_t stride[5];
  int32_t dtype, access;
};

constexpr const char* NAMES[] = {"value",         "value_mask",     "places",          "weights",
                                 "reference",     "output",         "grad_output",     "grad_places",
                                 "grad_weights",  "grad_reference", "grad_value_sums", "cell",
                                 "corner_weight", "order",          "bounds",          "grad_value"};

struct EmulatedArgs {
  int64_t B, S, H, D, N, L, K, cells, reference_levels, reference_size;
  const int64_t* levels;  // [L, 5]: start, height, width, first point, points
  EmulatedTensor tensors[16];
  int32_t fused, backwards;
};

DeviceArgs device_args(const EmulatedArgs& given, simt::Memory& memory) {
  DeviceArgs args{};
  args.B = given.B, args.S = given.S, args.H = given.H, args.D = given.D, args.N = given.N, args.K = given.K;
  args.L = given.L, args.cells = given.cells, args.fused = given.fused;
  args.reference_levels = given.reference_levels, args.reference_size = given.reference_size;
  for (int64_t l = 0; l < given.L && l < MAX_LEVELS; ++l) {
    const int64_t* level = given.levels + 5 * l;
    args.levels[l] = {level[0], int32_t(level[1]), int32_t(level[2]), int32_t(level[3]), int32_t(level[4])};
  }
  View* const views[] = {&args.value,         &args.value_mask,     &args.places,          &args.weights,
                         &args.reference,     &args.output,         &args.grad_output,     &args.grad_places,
                         &args.grad_weights,  &args.grad_reference, &args.grad_value_sums, &args.cell,
                         &args.corner_weight, &args.order,          &args.bounds,          &args.grad_value};
  for (int i = 0; i < 16; ++i) {
    const EmulatedTensor& tensor = given.tensors[i];
    if (tensor.storage == nullptr) continue;
    views[i]->data =
        tensor.offset + memory.add(NAMES[i], tensor.storage, tensor.bytes, tensor.belongs, simt::Access(tensor.access));
    views[i]->dtype = DType(tensor.dtype);
    std::copy(tensor.stride, tensor.stride + 5, views[i]->stride);
  }
  return args;
}

template <DType STORAGE>
int launch_by_name(char pass, const DeviceArgs& args, CUstream_st* stream) {
  switch (pass) {
    case 'f': return launch_forward<STORAGE>(args, stream);
    case 'b': return launch_backward<STORAGE>(args, stream);
    default: return launch_gather<STORAGE>(args, stream);
  }
}

int launch_of_dtype(char pass, const DeviceArgs& args, CUstream_st* stream) {
  switch (args.value.dtype) {
    case DType::float32: return launch_by_name<DType::float32>(pass, args, stream);
#if !defined(SIMT_FLOAT32_ONLY)
    case DType::float64: return launch_by_name<DType::float64>(pass, args, stream);
    case DType::float16: return launch_by_name<DType::float16>(pass, args, stream);
    case DType::bfloat16: return launch_by_name<DType::bfloat16>(pass, args, stream);
#endif
    default: throw simt::Error("a dtype that was not compiled");
  }
}

}  // namespace

// pass: f forward, b backward, g gather. Leaves the reason in `error` where something is wrong.
extern "C" void run_deform(
    char pass, const EmulatedArgs* given, int64_t* launches, int64_t* reductions, char* error, int64_t error_bytes) {
  CUstream_st stream;
  stream.backwards = given->backwards != 0;
  try {
    const int status = launch_of_dtype(pass, device_args(*given, stream.memory), &stream);
    if (status != cudaSuccess) throw simt::Error("refused with error " + std::to_string(status));
    stream.memory.check_outputs_are_complete();
    *launches = stream.launches;
    *reductions = stream.memory.reductions;
  } catch (const simt::Error& reason) {
    strncpy(error, reason.what(), size_t(error_bytes) - 1);
  }
}
