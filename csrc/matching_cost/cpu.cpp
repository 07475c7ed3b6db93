// A block of predictions at a time, side by side in vectors, against all targets of its image. The class cost of a
// block is taken once for each class that the image has, however many targets share it.

#include "../common/rows.h"
#include "args.h"
#include "math.h"

namespace rk::matching_cost::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

constexpr int64_t BLOCK = 256;  // predictions of a block

template <typename T>
struct Scratch {
  int64_t *block_of, *slot_of;  // [K] the last block that took a class's cost, and where it is
  T *cx, *cy, *w, *h, *x0, *y0, *x1, *y1, *area, *lse, *unknown;  // [BLOCK]
  T* class_cost;                                                  // [classes of an image, BLOCK]
  int64_t bytes;

  Scratch(const Args& a, int64_t worker) {
    const int64_t classes = smaller(a.K, a.most);
    Blocks counted(nullptr);
    take(counted, a.K, classes);
    const int64_t each = counted.used;
    bytes = a.parallel.workers * each + ALIGNMENT;
    Blocks blocks(a.workspace);
    if (a.workspace != nullptr) blocks.used += worker * each;
    take(blocks, a.K, classes);
  }

  void take(Blocks& blocks, int64_t all_classes, int64_t classes) {
    block_of = blocks.take<int64_t>(all_classes), slot_of = blocks.take<int64_t>(all_classes);
    T** const rows[] = {&cx, &cy, &w, &h, &x0, &y0, &x1, &y1, &area, &lse, &unknown};
    for (T** const row : rows) *row = blocks.take<T>(BLOCK);
    class_cost = blocks.take<T>(classes * BLOCK);
  }
};

template <typename T>
void read_block(const Args& a, const Scratch<T>& s, int64_t b, int64_t g, int64_t first, int64_t rows) {
  const int64_t start = b * a.boxes.stride[0] + g * a.boxes.stride[1] + first * a.boxes.stride[2];
  T box[4];
  for (int64_t i = 0; i < BLOCK; ++i) {
    if (i < rows) read_row<T>(box, 4, 4, a.boxes.dtype, a.boxes.data, start + i * a.boxes.stride[2], T(1));
    s.cx[i] = i < rows ? box[0] : 0, s.cy[i] = i < rows ? box[1] : 0;
    s.w[i] = i < rows ? box[2] : 0, s.h[i] = i < rows ? box[3] : 0;
  }
  for (int64_t i = 0; i < BLOCK; i += LANES<T>) {
    const auto p = corners_of<T>(load(s.cx + i), load(s.cy + i), load(s.w + i), load(s.h + i));
    store(s.x0 + i, p.x0), store(s.y0 + i, p.y0), store(s.x1 + i, p.x1), store(s.y1 + i, p.y1);
    store(s.area + i, area_of(p));
  }
  if (a.lse.data == nullptr) return;
  const T* const lse = static_cast<const T*>(a.lse.data) + (b * a.G + g) * a.N + first;
  for (int64_t i = 0; i < BLOCK; ++i) s.lse[i] = i < rows ? lse[i] : 0;
}

// The class cost of a block for one class, weighted.
template <typename T>
void take_class(const Args& a, const Scratch<T>& s, int64_t offset, int64_t rows, T* cost) {
  with_storage(a.logits.dtype, [&](auto type) {
    using Storage = decltype(type);
    const Storage* const from = static_cast<const Storage*>(a.logits.data) + offset;
    for (int64_t i = 0; i < BLOCK; ++i) cost[i] = i < rows ? load_as<T>(from[i * a.logits.stride[2]]) : 0;
  });
  const T weight = T(a.class_weight), alpha = T(a.alpha), gamma = T(a.gamma);
  const auto exponential = [](Vec<T> x) { return exp_nonpositive(x); };
  for (int64_t i = 0; i < BLOCK; i += LANES<T>) {
    const Vec<T> x = load(cost + i);
    const Vec<T> value = a.lse.data == nullptr ? focal_cost<T, Vec<T>>(x, alpha, gamma, exponential)
                                               : -exp_nonpositive(x - load(s.lse + i));
    store(cost + i, value * weight);
  }
}

template <typename T>
void cost_of_target(const Args& a, const Scratch<T>& s, const T* target, const T* class_cost, int64_t rows, T* output) {
  const T l1_weight = T(a.l1_weight), giou_weight = T(a.giou_weight);
  const Vec<T> cx = broadcast(target[0]), cy = broadcast(target[1]), w = broadcast(target[2]), h = broadcast(target[3]);
  const auto t = corners_of<T>(cx, cy, w, h);
  const Vec<T> area = area_of(t);
  const auto magnitude = [](Vec<T> x) { return x < Vec<T>{} ? -x : x; };
  for (int64_t i = 0; i < rows; i += LANES<T>) {
    const Corners<Vec<T>> p = {load(s.x0 + i), load(s.y0 + i), load(s.x1 + i), load(s.y1 + i)};
    const Vec<T> giou = generalized_iou<T>(overlap_of(p, load(s.area + i), t, area));
    const Vec<T> l1 = magnitude(load(s.cx + i) - cx) + magnitude(load(s.cy + i) - cy) + magnitude(load(s.w + i) - w) +
        magnitude(load(s.h + i) - h);
    const Vec<T> cost = marked<T>(load(class_cost + i) + l1 * l1_weight - giou * giou_weight);
    if (i + LANES<T> <= rows) store(output + i, cost);
    else
      for (int64_t lane = 0; i + lane < rows; ++lane) output[i + lane] = cost[lane];
  }
}

template <typename T>
void run(const Args& a) {
  const int64_t blocks = (a.N + BLOCK - 1) / BLOCK;
  a.parallel.each([&](int64_t worker) {
    const Scratch<T> s(a, worker);
    for (int64_t k = 0; k < a.K; ++k) s.block_of[k] = -1;
    for (int64_t i = 0; i < BLOCK; ++i) s.unknown[i] = T(__builtin_nan(""));
    int64_t first_target = 0;
    for (int64_t b = 0, item = 0; b < a.B; first_target += a.counts[b++]) {
      if (a.counts[b] == 0) continue;
      for (int64_t each = 0; each < a.G * blocks; ++each, ++item) {
        if (item % a.parallel.workers != worker) continue;
        const int64_t g = each / blocks, first = each % blocks * BLOCK, rows = smaller(a.N - first, BLOCK);
        read_block(a, s, b, g, first, rows);
        const int64_t start = b * a.logits.stride[0] + g * a.logits.stride[1] + first * a.logits.stride[2];
        int64_t taken = 0;
        for (int64_t t = first_target; t < first_target + a.counts[b]; ++t) {
          const int64_t label = a.labels[t];
          const T* class_cost = s.unknown;
          if (label >= 0 && label < a.K) {
            if (s.block_of[label] != item) {
              s.block_of[label] = item, s.slot_of[label] = taken++;
              take_class(a, s, start + label, rows, s.class_cost + s.slot_of[label] * BLOCK);
            }
            class_cost = s.class_cost + s.slot_of[label] * BLOCK;
          }
          T* const output = static_cast<T*>(a.output.data) + (t * a.G + g) * a.N + first;
          cost_of_target(a, s, static_cast<const T*>(a.true_boxes) + 4 * t, class_cost, rows, output);
        }
      }
    }
  });
}

}  // namespace

int64_t forward_workspace(const Args& a) {
  return a.output.dtype == DType::float64 ? Scratch<double>(a, 0).bytes : Scratch<float>(a, 0).bytes;
}

void forward(const Args& a) { a.output.dtype == DType::float64 ? run<double>(a) : run<float>(a); }

}  // namespace rk::matching_cost::RK_SIMD
