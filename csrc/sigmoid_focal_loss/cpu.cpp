// Losses and gradients of a block of queries at a time, classes side by side in vectors.

#include "../common/rows.h"
#include "args.h"
#include "math.h"

namespace rk::sigmoid_focal_loss::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

constexpr int64_t BLOCK = 1024;  // classes of all queries of a block, about

inline int64_t queries_of_block(const Args& a) { return a.K < BLOCK ? BLOCK / a.K : 1; }

template <typename T>
struct Block {
  int64_t queries, width;
  T *z, *loss, *grad;  // [queries * K]

  Block(const Args& a, int64_t worker) {
    queries = queries_of_block(a);
    width = round_up_to_lanes<T>(queries * a.K);
    Blocks blocks(a.workspace);
    z = blocks.take<T>(a.parallel.workers * 3 * width) + worker * 3 * width;
    loss = z + width, grad = loss + width;
  }
};

template <typename T>
T sum_of_row(const T* row, int64_t n) {
  Vec<T> lanes{};
  int64_t i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) lanes += load(row + i);
  T sum = sum_of_lanes<T>(lanes);
  for (; i < n; ++i) sum += row[i];
  return sum;
}

template <typename T>
void forward_queries(const Args& a, int64_t worker) {
  const Block<T> block(a, worker);
  const T alpha = T(a.alpha), gamma = T(a.gamma), scale = T(a.scale);
  const Share share = share_of(a.T, worker, a.parallel.workers);
  for (int64_t first = share.begin; first < share.end; first += block.queries) {
    const int64_t rows = smaller(share.end - first, block.queries);
    const int64_t used = rows * a.K, padded = round_up_to_lanes<T>(used);
    for (int64_t i = 0; i < rows; ++i)
      read_row<T>(block.z + i * a.K, a.K, a.K, a.logits.dtype, a.logits.data, (first + i) * a.logits.stride[0], T(1));
    for (int64_t i = used; i < padded; ++i) block.z[i] = 0;
    const int64_t* const targets = a.targets + first;
    for (int64_t i = 0; i < rows; ++i)
      if (targets[i] >= 0 && targets[i] < a.K) block.z[i * a.K + targets[i]] *= -1;
    for (int64_t i = 0; i < padded; i += LANES<T>) {
      const auto terms = focal_terms<T, Vec<T>>(load(block.z + i), gamma, [](Vec<T> x) { return exp_nonpositive(x); });
      store(block.loss + i, terms.loss);
      store(block.grad + i, terms.grad);
    }
    for (int64_t i = 0; i < rows; ++i) {
      T *const loss = block.loss + i * a.K, *const grad = block.grad + i * a.K;
      const bool has_target = targets[i] >= 0 && targets[i] < a.K;
      T positive = 0;
      if (has_target) {
        positive = loss[targets[i]];
        loss[targets[i]] = 0;
      }
      static_cast<T*>(a.loss.data)[first + i] = (1 - alpha) * sum_of_row(loss, a.K) + alpha * positive;
      if (a.grad.data == nullptr) continue;
      const int64_t start = (first + i) * a.K;
      write_row<T>(grad, a.K, a.grad.dtype, a.grad.data, start, scale * (1 - alpha));
      if (has_target) write_row<T>(grad + targets[i], 1, a.grad.dtype, a.grad.data, start + targets[i], -scale * alpha);
    }
  }
}

template <typename T>
void backward_queries(const Args& a, int64_t worker) {
  const T *const factors = static_cast<const T*>(a.grad_loss.data), scale = T(a.scale);
  const Share share = share_of(a.T, worker, a.parallel.workers);
  with_storage(a.grad.dtype, [&](auto type) {
    using Storage = decltype(type);
    for (int64_t t = share.begin; t < share.end; ++t) {
      const Storage* const from = static_cast<const Storage*>(a.grad.data) + t * a.K;
      Storage* const to = static_cast<Storage*>(a.grad_logits.data) + t * a.K;
      const T factor = scale * factors[t];
      for (int64_t k = 0; k < a.K; ++k) to[k] = store_as<Storage>(factor * load_as<T>(from[k]));
    }
  });
}

}  // namespace

int64_t forward_workspace(const Args& a) {
  const int64_t size = a.loss.dtype == DType::float64 ? 8 : 4;
  return a.parallel.workers * 3 * round_up_to_lanes<float>(queries_of_block(a) * a.K) * size + 2 * ALIGNMENT;
}

void forward(const Args& a) {
  const auto work = a.loss.dtype == DType::float64 ? forward_queries<double> : forward_queries<float>;
  a.parallel.each([&](int64_t worker) { work(a, worker); });
}

int64_t backward_workspace(const Args&) { return 0; }

void backward(const Args& a) {
  const auto work = a.grad_loss.dtype == DType::float64 ? backward_queries<double> : backward_queries<float>;
  a.parallel.each([&](int64_t worker) { work(a, worker); });
}

}  // namespace rk::sigmoid_focal_loss::RK_SIMD
