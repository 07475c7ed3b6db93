#pragma once
// PyTorch's stable sort through the stable ABI, on any device and without waiting for it.

#include <array>
#include <vector>

#include "stable_tensor.h"

namespace rk {

struct Ordered {
  Tensor order;   // [n] int64: the places of the keys, equal ones in the order they came in
  Tensor bounds;  // [count + 1] int64: where in `order` the places of each key begin
};

template <size_t N>
void call_aten(const char* name, const char* overload, std::array<StableIValue, N>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
}

// 0, 1, ..., count, as `like` is stored; aten::arange takes numbers of a kind that the stable ABI has no words for.
inline Tensor range(const Tensor& like, int64_t count) {
  using torch::stable::detail::from;
  Tensor steps = torch::stable::new_empty(like, std::vector<int64_t>{count + 1});
  torch::stable::fill_(steps, 1);
  Tensor first = torch::stable::narrow(steps, 0, 0, 1);
  torch::stable::zero_(first);
  std::array<StableIValue, 3> cumsum{from(steps), from(int64_t(0)), from(std::optional(like.scalar_type()))};
  call_aten("aten::cumsum", "", cumsum);
  return torch::stable::detail::to<Tensor>(cumsum[0]);
}

// The stable order of `keys` [n], int32 or int64, in [0, count).
inline Ordered ordered_by(const Tensor& keys, int64_t count) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> sort{from(keys), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  call_aten("aten::sort", "stable", sort);
  const Tensor sorted = to<Tensor>(sort[0]), order = to<Tensor>(sort[1]);
  std::array<StableIValue, 6> search{from(sorted), from(range(keys, count)), from(false),
                                     from(false),  from(std::nullopt),       from(std::nullopt)};
  call_aten("aten::searchsorted", "Tensor", search);
  return {order, to<Tensor>(search[0])};
}

}  // namespace rk
