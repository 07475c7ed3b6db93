// The kernels of csrc/ms_deform_attn over the emulation, as the Python module SIMT_MODULE.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/ms_deform_attn/launch.cuh"

using namespace rk;
using namespace rk::ms_deform_attn;

namespace {

using Sizes = std::map<std::string, int64_t>;
using Levels = std::vector<std::array<int64_t, 5>>;  // start, height, width, first point, points
// (address of the storage, its bytes, offset in bytes, address of a mark for each byte that belongs to the tensor,
// strides, dtype, access) of each name
using Tensors =
    std::map<std::string, std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, std::vector<int64_t>, int32_t, int32_t>>;

const std::map<std::string, View DeviceArgs::*> VIEWS = {
#define VIEW(name) {#name, &DeviceArgs::name}
    VIEW(value),         VIEW(value_mask),     VIEW(places),      VIEW(weights),
    VIEW(reference),     VIEW(output),         VIEW(grad_output), VIEW(grad_places),
    VIEW(grad_weights),  VIEW(grad_reference), VIEW(cell),        VIEW(grad_value_sums),
    VIEW(corner_weight), VIEW(order),          VIEW(bounds),      VIEW(grad_value)};

DeviceArgs device_args(const Sizes& sizes, const Levels& levels, const Tensors& tensors, simt::Memory& memory) {
  DeviceArgs args{};
  args.B = sizes.at("B"), args.S = sizes.at("S"), args.H = sizes.at("H"), args.D = sizes.at("D");
  args.N = sizes.at("N"), args.K = sizes.at("K"), args.L = int64_t(levels.size()), args.cells = sizes.at("cells");
  args.reference_levels = sizes.at("reference_levels"), args.reference_size = sizes.at("reference_size");
  args.fused = sizes.at("fused") != 0;
  for (size_t l = 0; l < levels.size() && l < size_t(MAX_LEVELS); ++l) {
    const auto& [start, height, width, first_point, points] = levels[l];
    args.levels[l] = {start, int32_t(height), int32_t(width), int32_t(first_point), int32_t(points)};
  }
  for (const auto& [name, described] : tensors) {
    const auto& [storage, bytes, offset, belongs, strides, dtype, access] = described;
    View& view = args.*VIEWS.at(name);
    view.data = offset +
        memory.add(
            name, reinterpret_cast<void*>(storage), bytes, reinterpret_cast<const uint8_t*>(belongs),
            simt::Access(access));
    view.dtype = DType(dtype);
    std::copy(strides.begin(), strides.end(), view.stride);
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

// pass: f forward, b backward, g gather. Returns the numbers of launches and of reductions.
std::pair<int64_t, int64_t> launch_pass(
    char pass, const Sizes& sizes, const Levels& levels, const Tensors& tensors, bool backwards) {
  CUstream_st stream;
  stream.backwards = backwards;
  const int status = launch_of_dtype(pass, device_args(sizes, levels, tensors, stream.memory), &stream);
  if (status != cudaSuccess) throw simt::Error("refused with error " + std::to_string(status));
  stream.memory.check_outputs_are_complete();
  return {stream.launches, stream.memory.reductions};
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, m) { m.def("launch", launch_pass); }
