// A box at a time; most predictions have no target.

#include "../common/rows.h"
#include "args.h"
#include "math.h"

namespace rk::box_loss::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

// Calls each(m, terms) for the boxes of a worker's share, with null for those that have no target.
template <typename T, typename Each>
void for_boxes(const Args& a, int64_t worker, Each each) {
  const Share share = share_of(a.M, worker, a.parallel.workers);
  for (int64_t m = share.begin; m < share.end; ++m) {
    const int64_t target = a.target[m];
    if (target < 0 || target >= a.T) {
      each(m, static_cast<const BoxTerms<T>*>(nullptr));
      continue;
    }
    T box[4];
    read_row<T>(box, 4, 4, a.boxes.dtype, a.boxes.data, m * a.boxes.stride[0], T(1));
    const BoxTerms<T> terms = box_terms<T>(box, static_cast<const T*>(a.true_boxes) + 4 * target);
    each(m, &terms);
  }
}

template <typename T>
void forward_boxes(const Args& a, int64_t worker) {
  T* const output = static_cast<T*>(a.output.data);
  for_boxes<T>(a, worker, [&](int64_t m, const BoxTerms<T>* terms) {
    output[2 * m] = terms == nullptr ? 0 : T(a.l1_weight) * terms->l1;
    output[2 * m + 1] = terms == nullptr ? 0 : T(a.giou_weight) * terms->giou;
  });
}

template <typename T>
void backward_boxes(const Args& a, int64_t worker) {
  const T* const grad_output = static_cast<const T*>(a.grad_output.data);
  for_boxes<T>(a, worker, [&](int64_t m, const BoxTerms<T>* terms) {
    const T by_l1 = T(a.l1_weight) * grad_output[2 * m], by_giou = T(a.giou_weight) * grad_output[2 * m + 1];
    T grad[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4 && terms != nullptr; ++i) grad[i] = by_l1 * terms->grad_l1[i] + by_giou * terms->grad_giou[i];
    write_row<T>(grad, 4, a.grad_boxes.dtype, a.grad_boxes.data, m * a.grad_boxes.stride[0], T(1));
  });
}

}  // namespace

int64_t forward_workspace(const Args&) { return 0; }

void forward(const Args& a) {
  const auto work = a.output.dtype == DType::float64 ? forward_boxes<double> : forward_boxes<float>;
  a.parallel.each([&](int64_t worker) { work(a, worker); });
}

int64_t backward_workspace(const Args&) { return 0; }

void backward(const Args& a) {
  const auto work = a.grad_output.dtype == DType::float64 ? backward_boxes<double> : backward_boxes<float>;
  a.parallel.each([&](int64_t worker) { work(a, worker); });
}

}  // namespace rk::box_loss::RK_SIMD
