#pragma once
// PyTorch's stable sort through the stable ABI, on any device and without waiting for it.

#include "stable_tensor.h"

namespace rk {

struct Ordered {
  Tensor order;   // [n] int64: the places of the keys, equal ones in the order they came in
  Tensor bounds;  // [count + 1] int64: where in `order` the places of each key begin
};

// Of `keys` [n], int32 or int64, in [0, count).
inline Ordered ordered_by(const Tensor& keys, int64_t count) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> sort{from(keys), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", sort.data(), TORCH_ABI_VERSION));
  const Tensor sorted = to<Tensor>(sort[0]), order = to<Tensor>(sort[1]);
  std::array<StableIValue, 5> arange{
      from(double(count + 1)), from(std::optional(keys.scalar_type())), from(std::nullopt),
      from(std::optional(keys.device())), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::arange", "", arange.data(), TORCH_ABI_VERSION));
  const Tensor every_key = to<Tensor>(arange[0]);
  std::array<StableIValue, 6> search{
      from(sorted), from(every_key), from(false), from(false), from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::searchsorted", "Tensor", search.data(), TORCH_ABI_VERSION));
  return {order, to<Tensor>(search[0])};
}

}  // namespace rk
