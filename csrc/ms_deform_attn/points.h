#pragma once
// One query of one head: the pixel coordinates and weights of its points, where their corners are, and their gradients.

#include "lane_sums.h"
#include "math.h"
#include "scratch.h"

namespace rk {
namespace RK_SIMD {
namespace {

using namespace deform;

// Rows of one (batch, head) pair as T: where the first is, the distance between two, and where a row of zeros is.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, zeros_at;
  const uint8_t* mask;  // [S], 1 counts as zero; null where masked rows hold zeros already
  int64_t mask_stride;
};

inline int64_t row_of_points(const View& view, int64_t b, int64_t n, int64_t h) {
  return b * view.stride[0] + n * view.stride[1] + h * view.stride[2];
}

template <typename T>
void read_plain(const Args& args, int64_t b, int64_t n, int64_t h, const Scratch<T>& scratch) {
  const Scratch<T> s = scratch;  // a copy: no store can change its pointers
  const View &places = args.places, &weights = args.weights;
  read_row(s.pairs, 2 * args.K, 2 * s.padded, places.dtype, places.data, row_of_points(places, b, n, h), T(1));
  read_row(s.weight, args.K, s.padded, weights.dtype, weights.data, row_of_points(weights, b, n, h), T(1));
  RK_INDEPENDENT
  for (int64_t k = 0; k < s.padded; ++k) {
    s.x[k] = pixel_of_location(s.pairs[2 * k], T(s.width[k]));
    s.y[k] = pixel_of_location(s.pairs[2 * k + 1], T(s.height[k]));
  }
}

template <typename T>
void softmax_in_place(T* logits, int64_t count, int64_t padded) {
  for (int64_t k = count; k < padded; ++k) logits[k] = -T(__builtin_inf());
  Vec<T> maximum = broadcast(-T(__builtin_inf())), sum = {};
  for (int64_t k = 0; k < padded; k += LANES<T>) maximum = max<T>(load(logits + k), maximum);
  maximum = maximum_in_every_lane<T>(maximum);
  for (int64_t k = 0; k < padded; k += LANES<T>) {
    const Vec<T> e = exp_nonpositive(load(logits + k) - maximum);
    store(logits + k, e);
    sum += e;
  }
  const Vec<T> factor = T(1) / sum_in_every_lane<T>(sum);
  for (int64_t k = 0; k < padded; k += LANES<T>) store(logits + k, load(logits + k) * factor);
}

template <typename T>
void read_reference(const Args& args, int64_t b, int64_t n, const Scratch<T>& s) {
  const View& reference = args.reference;
  T box[4] = {};
  for (int64_t l = 0, k = 0; l < args.L; ++l) {
    if (l < args.reference_levels) {
      const int64_t offset = b * reference.stride[0] + n * reference.stride[1] + l * reference.stride[2];
      read_row(box, args.reference_size, args.reference_size, reference.dtype, reference.data, offset, T(1));
    }
    for (int64_t p = 0; p < args.points[l]; ++p, ++k) {
      s.reference_x[k] = box[0];
      s.reference_y[k] = box[1];
      s.extent_x[k] = box[2];
      s.extent_y[k] = box[3];
    }
  }
}

template <typename T>
void read_fused(const Args& args, int64_t b, int64_t n, int64_t h, const Scratch<T>& scratch) {
  const Scratch<T> s = scratch;
  const View &places = args.places, &weights = args.weights;
  read_row(s.pairs, 2 * args.K, 2 * s.padded, places.dtype, places.data, row_of_points(places, b, n, h), T(1));
  read_row(s.weight, args.K, s.padded, weights.dtype, weights.data, row_of_points(weights, b, n, h), T(1));
  softmax_in_place(s.weight, args.K, s.padded);
  read_reference(args, b, n, s);
  RK_INDEPENDENT
  for (int64_t k = 0; k < s.padded; ++k) {
    s.offset_x[k] = s.pairs[2 * k];
    s.offset_y[k] = s.pairs[2 * k + 1];
  }
  if (args.reference_size == 2) {
    RK_INDEPENDENT
    for (int64_t k = 0; k < s.padded; ++k) {
      s.x[k] = pixel_of_point(s.reference_x[k], s.offset_x[k], T(s.width[k]));
      s.y[k] = pixel_of_point(s.reference_y[k], s.offset_y[k], T(s.height[k]));
    }
  } else {
    RK_INDEPENDENT
    for (int64_t k = 0; k < s.padded; ++k) {
      s.x[k] = pixel_of_box(s.reference_x[k], s.extent_x[k], s.offset_x[k], s.half_step[k], T(s.width[k]));
      s.y[k] = pixel_of_box(s.reference_y[k], s.extent_y[k], s.offset_y[k], s.half_step[k], T(s.height[k]));
    }
  }
}

// Where the corners of every point are among the rows of values (and of gradients, packed) and what each weighs. A
// corner that does not exist is the row of zeros and weighs 0, and its gradient goes to the row after the last, which
// nobody reads: the loops over rows have no branches.
template <typename T, bool GRADIENTS>
void find_corners(const Scratch<T>& scratch, const Rows<T>& rows_of_head, int64_t positions) {
  const Scratch<T> s = scratch;
  const Rows<T> rows = rows_of_head;
  const int64_t nowhere = positions * s.row;
  for (int64_t block = 0; block < s.padded; block += BLOCK) {
    int32_t exists[CORNERS][BLOCK];
    RK_INDEPENDENT
    for (int64_t i = 0; i < BLOCK; ++i) {
      const int64_t k = block + i;
      const Cell<T> cell = cell_of(s.x[k], s.y[k], s.height[k], s.width[k]);
      const T above = s.weight[k] * (T(1) - cell.fraction_y), below = s.weight[k] * cell.fraction_y;
      s.corner_weight[0][k] = cell.top & cell.left ? above * (T(1) - cell.fraction_x) : T(0);
      s.corner_weight[1][k] = cell.top & cell.right ? above * cell.fraction_x : T(0);
      s.corner_weight[2][k] = cell.bottom & cell.left ? below * (T(1) - cell.fraction_x) : T(0);
      s.corner_weight[3][k] = cell.bottom & cell.right ? below * cell.fraction_x : T(0);
      exists[0][i] = cell.top & cell.left;
      exists[1][i] = cell.top & cell.right;
      exists[2][i] = cell.bottom & cell.left;
      exists[3][i] = cell.bottom & cell.right;
      s.fraction_x[k] = cell.fraction_x;
      s.fraction_y[k] = cell.fraction_y;
      s.inside[k] = cell.inside;
      s.row_of_cell[k] = cell.row;
      s.column_of_cell[k] = cell.column;
    }
    RK_INDEPENDENT
    for (int64_t i = 0; i < BLOCK; ++i) {
      const int64_t k = block + i, width = s.width[k];
      const int64_t position = s.start[k] + int64_t(s.row_of_cell[k]) * width + s.column_of_cell[k];
      const int64_t at = position * rows.stride, below = at + width * rows.stride;
      s.value_at[0][k] = exists[0][i] ? at : rows.zeros_at;
      s.value_at[1][k] = exists[1][i] ? at + rows.stride : rows.zeros_at;
      s.value_at[2][k] = exists[2][i] ? below : rows.zeros_at;
      s.value_at[3][k] = exists[3][i] ? below + rows.stride : rows.zeros_at;
      if (GRADIENTS) {
        const int64_t grad_at = position * s.row, grad_below = grad_at + width * s.row;
        s.grad_at[0][k] = exists[0][i] ? grad_at : nowhere;
        s.grad_at[1][k] = exists[1][i] ? grad_at + s.row : nowhere;
        s.grad_at[2][k] = exists[2][i] ? grad_below : nowhere;
        s.grad_at[3][k] = exists[3][i] ? grad_below + s.row : nowhere;
      }
    }
  }
  if (rows.mask == nullptr) return;
  for (int64_t c = 0; c < CORNERS; ++c) {
    for (int64_t k = 0; k < s.padded; ++k) {
      if (s.value_at[c][k] == rows.zeros_at) continue;
      const int64_t row = s.row_of_cell[k] + c / 2, column = s.column_of_cell[k] + c % 2;
      if (rows.mask[(s.start[k] + row * s.width[k] + column) * rows.mask_stride]) s.value_at[c][k] = rows.zeros_at;
    }
  }
}

// From the lanes of grad_output . corner to the gradients of weights and pixel coordinates.
template <typename T>
void sample_adjoints(const Scratch<T>& scratch) {
  const Scratch<T> s = scratch;
  for (int64_t c = 0; c < CORNERS; ++c)
    for (int64_t k = 0; k < s.padded; k += LANES<T>)
      store(s.dot[c] + k, sums_of_vectors(s.partial[c] + k * LANES<T>));
  RK_INDEPENDENT
  for (int64_t k = 0; k < s.padded; ++k) {
    const SampleAdjoint<T> adjoint =
        sample_adjoint(s.dot[0][k], s.dot[1][k], s.dot[2][k], s.dot[3][k], s.fraction_x[k], s.fraction_y[k]);
    s.grad_weight[k] = adjoint.weight;
    s.grad_x[k] = s.inside[k] ? s.weight[k] * adjoint.x : T(0);
    s.grad_y[k] = s.inside[k] ? s.weight[k] * adjoint.y : T(0);
  }
}

template <typename T>
void write_plain(const Args& args, int64_t row, const Scratch<T>& scratch) {
  const Scratch<T> s = scratch;
  RK_INDEPENDENT
  for (int64_t k = 0; k < args.K; ++k) {
    s.pairs[2 * k] = location_adjoint(s.grad_x[k], T(s.width[k]));
    s.pairs[2 * k + 1] = location_adjoint(s.grad_y[k], T(s.height[k]));
  }
  write_row(s.pairs, 2 * args.K, args.grad_places.dtype, args.grad_places.data, row * args.K * 2, T(1));
  write_row(s.grad_weight, args.K, args.grad_weights.dtype, args.grad_weights.data, row * args.K, T(1));
}

// This query and head's part of grad_reference [reference_levels, reference_size].
template <typename T>
void add_reference_gradients(const Args& args, const Scratch<T>& s, T* grad_reference) {
  const int64_t size = args.reference_size;
  for (int64_t i = 0; i < args.reference_levels * size; ++i) grad_reference[i] = T(0);
  for (int64_t k = 0; k < args.K; ++k) {
    if (!s.inside[k]) continue;
    T* grad = grad_reference + (args.reference_levels == 1 ? 0 : s.level[k]) * size;
    const T width = T(s.width[k]), height = T(s.height[k]);
    if (size == 2) {
      grad[0] += point_adjoint(s.grad_x[k], width).reference;
      grad[1] += point_adjoint(s.grad_y[k], height).reference;
    } else {
      const BoxAdjoint<T> x = box_adjoint(s.grad_x[k], s.extent_x[k], s.offset_x[k], s.half_step[k], width);
      const BoxAdjoint<T> y = box_adjoint(s.grad_y[k], s.extent_y[k], s.offset_y[k], s.half_step[k], height);
      grad[0] += x.center;
      grad[1] += y.center;
      grad[2] += x.extent;
      grad[3] += y.extent;
    }
  }
}

template <typename T>
void write_fused(const Args& args, int64_t row, const Scratch<T>& scratch, T* grad_reference) {
  const Scratch<T> s = scratch;
  Vec<T> expected = {};
  for (int64_t k = 0; k < s.padded; k += LANES<T>) expected += load(s.weight + k) * load(s.grad_weight + k);
  const T total = sum_in_every_lane<T>(expected)[0];
  RK_INDEPENDENT
  for (int64_t k = 0; k < s.padded; ++k)
    s.grad_weight[k] = softmax_adjoint(s.weight[k], s.grad_weight[k], total);
  write_row(s.grad_weight, args.K, args.grad_weights.dtype, args.grad_weights.data, row * args.K, T(1));
  if (args.reference_size == 2) {
    RK_INDEPENDENT
    for (int64_t k = 0; k < args.K; ++k) {
      s.pairs[2 * k] = point_adjoint(s.grad_x[k], T(s.width[k])).offset;
      s.pairs[2 * k + 1] = point_adjoint(s.grad_y[k], T(s.height[k])).offset;
    }
  } else {
    RK_INDEPENDENT
    for (int64_t k = 0; k < args.K; ++k) {  // a point that is nowhere may have an infinite box: 0 inf is NaN
      const T x = box_adjoint(s.grad_x[k], s.extent_x[k], s.offset_x[k], s.half_step[k], T(s.width[k])).offset;
      const T y = box_adjoint(s.grad_y[k], s.extent_y[k], s.offset_y[k], s.half_step[k], T(s.height[k])).offset;
      s.pairs[2 * k] = s.inside[k] ? x : T(0);
      s.pairs[2 * k + 1] = s.inside[k] ? y : T(0);
    }
  }
  write_row(s.pairs, 2 * args.K, args.grad_places.dtype, args.grad_places.data, row * args.K * 2, T(1));
  if (grad_reference != nullptr) add_reference_gradients(args, s, grad_reference);
}

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
