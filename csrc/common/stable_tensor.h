#pragma once
// PyTorch's stable ABI on one side, the kernels' plain arguments on the other.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "view.h"

namespace rk {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using Numbers = std::vector<double>;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Bool: return DType::boolean;
    case ScalarType::Int: return DType::int32;
    case ScalarType::Long: return DType::int64;
    default: STD_TORCH_CHECK(false, "route_kernels: a dtype that no kernel takes"); return DType::none;
  }
}

inline View view_of(const Tensor& tensor) {
  View view;
  view.data = tensor.data_ptr();
  view.dtype = dtype_of(tensor);
  STD_TORCH_CHECK(tensor.dim() <= 5, "route_kernels: a tensor of more than five dimensions");
  for (int64_t d = 0; d < tensor.dim(); ++d) view.stride[d] = tensor.stride(d);
  return view;
}

inline View view_of(const MaybeTensor& tensor) { return tensor.has_value() ? view_of(*tensor) : View{}; }

// Workers are PyTorch's own threads: torch.set_num_threads() rules. More than `at_most`, what the work is worth, do
// not help. One worker is the calling thread.
inline Parallel torch_threads(int64_t at_most) {
  static std::mutex one_at_a_time;  // in a forked child PyTorch makes its pool anew, and fails where two do it
  std::unique_lock<std::mutex> lock(one_at_a_time, std::defer_lock);
  if (in_forked_child()) lock.lock();
  const int64_t workers = std::max<int64_t>(1, std::min(int64_t(torch::stable::get_num_threads()), at_most));
#ifndef RK_NEW_THREADS  // defined for ThreadSanitizer, which does not see how PyTorch's threads synchronise
  if (!in_forked_child()) {
    return {workers, [](int64_t count, Parallel::Body body, const void* context) {
              torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                for (int64_t worker = begin; worker < end; ++worker) body(worker, context);
              });
            }};
  }
#endif
  return {workers, run_on_new_threads};
}

// Scratch memory from PyTorch's allocator while `kernel` runs: an out-of-memory is PyTorch's error, and nothing leaks.
template <typename Args>
void run_with_workspace(int64_t (*bytes)(const Args&), void (*kernel)(const Args&), Args& args) {
  const int64_t size[1] = {bytes(args)};
  const Tensor scratch =
      torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size, 1), torch::headeronly::ScalarType::Byte);
  args.workspace = static_cast<char*>(scratch.data_ptr());
  kernel(args);
}

// Runs a kernel of the op whose namespace this is used in.
#define RK_RUN(kernel, args) ::rk::run_with_workspace(RK_OF_LEVEL(kernel##_workspace), RK_OF_LEVEL(kernel), args)

inline std::string simd_level_string() { return simd_level_name(); }

}  // namespace rk
