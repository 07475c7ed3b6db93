#pragma once
// One query of one head: the pixel coordinates and weights of its points, where their corners are, and their gradients.

#include "lane_sums.h"
#include "math.h"
#include "scratch.h"

namespace rk::ms_deform_attn::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

// Rows of one (batch, head) pair: where the first is, the distance between two, and where a row of zeros is.
struct Rows {
  const void* data;
  int64_t stride, zeros_at;
  const uint8_t* mask;  // [S], 1 counts as zero; null where masked rows hold zeros already
  int64_t mask_stride;
};

inline int64_t row_of_points(const View& view, int64_t b, int64_t n, int64_t h) {
  return b * view.stride[0] + n * view.stride[1] + h * view.stride[2];
}

// The `count` values of one query and head as T, in whole blocks: what comes after them in memory fills the last, or
// zeros where the tensor ends. (A block written in pieces and read at once would wait for the pieces.)
template <typename T>
void read_blocks(const Args& args, const View& view, int64_t offset, int64_t count, T* to) {
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;
  const int64_t end = row_of_points(view, args.B - 1, args.N - 1, args.H - 1) + count;
  if (offset + blocks * BLOCK > end) return read_row(to, count, blocks * BLOCK, view.dtype, view.data, offset, T(1));
  with_storage(view.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const Storage* from = static_cast<const Storage*>(view.data) + offset;
    for (int64_t block = 0; block < blocks; ++block, from += BLOCK, to += BLOCK) {
      RK_INDEPENDENT
      for (int64_t i = 0; i < BLOCK; ++i) to[i] = load_as<T>(from[i]);
    }
  });
}

// Where every logit is -inf every weight is 0: the maximum starts above -inf, and a sum below 1 is 0.
template <typename T>
void softmax_in_place(const Scratch<T>& s, T* logits) {
  const int64_t padded = s.blocks * BLOCK;
  T* const last = logits + padded - BLOCK;
  RK_INDEPENDENT
  for (int64_t i = 0; i < BLOCK; ++i) last[i] = s.levels[s.blocks - 1].exists[i] ? last[i] : -T(__builtin_inf());
  Vec<T> maximum = broadcast(lowest_logit<T>()), sum = {};
  for (int64_t k = 0; k < padded; k += LANES<T>) maximum = max<T>(load(logits + k), maximum);
  maximum = maximum_in_every_lane<T>(maximum);
  for (int64_t k = 0; k < padded; k += LANES<T>) {
    const Vec<T> e = exp_nonpositive(load(logits + k) - maximum);
    store(logits + k, e);
    sum += e;
  }
  const Vec<T> total = sum_in_every_lane<T>(sum);
  const Vec<T> factor = T(1) / (total < 1 ? broadcast(T(1)) : total);
  for (int64_t k = 0; k < padded; k += LANES<T>) store(logits + k, load(logits + k) * factor);
}

template <typename T>
void read_weights(const Args& args, int64_t b, int64_t n, int64_t h, const Scratch<T>& s, PointBlock<T>* points) {
  const View& weights = args.weights;
  read_blocks(args, weights, row_of_points(weights, b, n, h), args.K, s.singles);
  if (args.fused && s.blocks > 0) softmax_in_place(s, s.singles);
  for (int64_t block = 0; block < s.blocks; ++block)
    memcpy(points[block].weight, s.singles + block * BLOCK, BLOCK * sizeof(T));
}

template <typename T>
void read_locations(const Args& args, const Scratch<T>& s, PointBlock<T>* points) {
  for (int64_t block = 0; block < s.blocks; ++block) {
    PointBlock<T>& p = points[block];
    const LevelBlock<T>& level = s.levels[block];
    const T* pairs = s.pairs + block * 2 * BLOCK;
    RK_INDEPENDENT
    for (int64_t i = 0; i < BLOCK; ++i) {
      p.x[i] = pixel_of_location(pairs[2 * i], T(level.width[i]));
      p.y[i] = pixel_of_location(pairs[2 * i + 1], T(level.height[i]));
    }
  }
}

// The query's references [reference_levels, reference_size], to be indexed by LevelBlock::reference_at.
template <typename T>
const T* references_of(const Args& args, int64_t b, int64_t n, const Scratch<T>& s) {
  const View& reference = args.reference;
  const int64_t offset = b * reference.stride[0] + n * reference.stride[1], size = args.reference_size;
  if (Scratch<T>::reads_references_in_place(args)) return static_cast<const T*>(reference.data) + offset;
  for (int64_t l = 0; l < args.reference_levels; ++l)
    read_row(
        s.references + l * size, size, size, reference.dtype, reference.data, offset + l * reference.stride[2], T(1));
  return s.references;
}

template <typename T>
void read_offsets(const Args& args, int64_t b, int64_t n, const Scratch<T>& s, PointBlock<T>* points) {
  const T* references = references_of(args, b, n, s);
  for (int64_t block = 0; block < s.blocks; ++block) {
    PointBlock<T>& p = points[block];
    const LevelBlock<T>& level = s.levels[block];
    const T* pairs = s.pairs + block * 2 * BLOCK;
    RK_INDEPENDENT
    for (int64_t i = 0; i < BLOCK; ++i) {
      p.offset_x[i] = pairs[2 * i];
      p.offset_y[i] = pairs[2 * i + 1];
    }
    RK_INDEPENDENT
    for (int64_t i = 0; i < BLOCK; ++i) {
      p.reference_x[i] = references[level.reference_at[i]];
      p.reference_y[i] = references[level.reference_at[i] + 1];
    }
    if (args.reference_size == 2) {
      RK_INDEPENDENT
      for (int64_t i = 0; i < BLOCK; ++i) {
        p.x[i] = pixel_of_point(p.reference_x[i], p.offset_x[i], T(level.width[i]));
        p.y[i] = pixel_of_point(p.reference_y[i], p.offset_y[i], T(level.height[i]));
      }
    } else {
      RK_INDEPENDENT
      for (int64_t i = 0; i < BLOCK; ++i) {
        p.extent_x[i] = references[level.reference_at[i] + 2];
        p.extent_y[i] = references[level.reference_at[i] + 3];
      }
      RK_INDEPENDENT
      for (int64_t i = 0; i < BLOCK; ++i) {
        const T step = level.half_step[i], width = T(level.width[i]), height = T(level.height[i]);
        p.x[i] = pixel_of_box(p.reference_x[i], p.extent_x[i], p.offset_x[i], step, width);
        p.y[i] = pixel_of_box(p.reference_y[i], p.extent_y[i], p.offset_y[i], step, height);
      }
    }
  }
}

template <typename T>
void read_points(const Args& args, int64_t b, int64_t n, int64_t h, const Scratch<T>& s, PointBlock<T>* points) {
  const View& places = args.places;
  read_blocks(args, places, row_of_points(places, b, n, h), 2 * args.K, s.pairs);
  if (args.fused) read_offsets(args, b, n, s, points);
  else read_locations(args, s, points);
  read_weights(args, b, n, h, s, points);
}

// Where the corners of every point are among the rows of values (and of gradients, packed) and what each weighs. A
// corner that does not exist is the row of zeros and weighs 0, and its gradient goes to the row after the last, which
// nobody reads: the loops over rows have no branches.
template <typename T, bool GRADIENTS>
void find_corners(
    const LevelBlock<T>& level, const Rows& rows, int64_t grad_stride, int64_t positions, PointBlock<T>& p) {
  const int64_t stride = rows.stride, zeros_at = rows.zeros_at, nowhere = positions * grad_stride;
  int32_t exists[CORNERS][BLOCK];
  RK_INDEPENDENT
  for (int64_t i = 0; i < BLOCK; ++i) {
    const Cell<T> cell = cell_of(p.x[i], p.y[i], level.height[i], level.width[i]);
    const CornerWeights<T> share = corner_weights(cell.fraction_x, cell.fraction_y, p.weight[i]);
    p.corner_weight[0][i] = (cell.top & cell.left) ? share.top_left : T(0);
    p.corner_weight[1][i] = (cell.top & cell.right) ? share.top_right : T(0);
    p.corner_weight[2][i] = (cell.bottom & cell.left) ? share.bottom_left : T(0);
    p.corner_weight[3][i] = (cell.bottom & cell.right) ? share.bottom_right : T(0);
    exists[0][i] = cell.top & cell.left;
    exists[1][i] = cell.top & cell.right;
    exists[2][i] = cell.bottom & cell.left;
    exists[3][i] = cell.bottom & cell.right;
    p.fraction_x[i] = cell.fraction_x;
    p.fraction_y[i] = cell.fraction_y;
    p.inside[i] = cell.inside;
    p.row[i] = cell.row;
    p.column[i] = cell.column;
  }
  RK_INDEPENDENT
  for (int64_t i = 0; i < BLOCK; ++i) {
    const int64_t width = level.width[i], position = level.start[i] + p.row[i] * width + p.column[i];
    const int64_t at = position * stride, below = at + width * stride;
    p.value_at[0][i] = exists[0][i] ? at : zeros_at;
    p.value_at[1][i] = exists[1][i] ? at + stride : zeros_at;
    p.value_at[2][i] = exists[2][i] ? below : zeros_at;
    p.value_at[3][i] = exists[3][i] ? below + stride : zeros_at;
    if (GRADIENTS) {
      const int64_t grad_at = position * grad_stride, grad_below = grad_at + width * grad_stride;
      p.grad_at[0][i] = exists[0][i] ? grad_at : nowhere;
      p.grad_at[1][i] = exists[1][i] ? grad_at + grad_stride : nowhere;
      p.grad_at[2][i] = exists[2][i] ? grad_below : nowhere;
      p.grad_at[3][i] = exists[3][i] ? grad_below + grad_stride : nowhere;
    }
  }
}

template <typename T>
void skip_masked_corners(const LevelBlock<T>& level, const Rows& rows, PointBlock<T>& p) {
  for (int64_t c = 0; c < CORNERS; ++c) {
    for (int64_t i = 0; i < BLOCK; ++i) {
      if (p.value_at[c][i] == rows.zeros_at) continue;
      const int64_t row = p.row[i] + c / 2, column = p.column[i] + c % 2;
      const int64_t position = level.start[i] + row * level.width[i] + column;
      if (rows.mask[position * rows.mask_stride]) p.value_at[c][i] = rows.zeros_at;
    }
  }
}

// Everything that the loops over rows need to know of one query and head.
template <typename T, bool GRADIENTS>
void plan(
    const Args& args, int64_t b, int64_t n, int64_t h, const Rows& rows, const Scratch<T>& s, PointBlock<T>* points) {
  read_points(args, b, n, h, s, points);
  for (int64_t block = 0; block < s.blocks; ++block) {
    find_corners<T, GRADIENTS>(s.levels[block], rows, s.row, args.S, points[block]);
    if (rows.mask != nullptr) skip_masked_corners(s.levels[block], rows, points[block]);
  }
}

// ---- gradients ---------------------------------------------------------------------------------------------------

// From the lanes of grad_output . corner to the gradients of weights and, in pixels, of coordinates.
template <typename T>
void sample_adjoints(const T* products, PointBlock<T>& p) {
  T dot[CORNERS][BLOCK];
  for (int64_t c = 0; c < CORNERS; ++c)
    for (int64_t i = 0; i < BLOCK; i += LANES<T>)
      store(dot[c] + i, sums_of_vectors(products + (c * BLOCK + i) * LANES<T>));
  RK_INDEPENDENT
  for (int64_t i = 0; i < BLOCK; ++i) {
    const SampleAdjoint<T> adjoint =
        sample_adjoint(dot[0][i], dot[1][i], dot[2][i], dot[3][i], p.fraction_x[i], p.fraction_y[i]);
    p.grad_weight[i] = adjoint.weight;
    p.grad_x[i] = p.inside[i] ? p.weight[i] * adjoint.x : T(0);
    p.grad_y[i] = p.inside[i] ? p.weight[i] * adjoint.y : T(0);
  }
}

template <typename T>
void softmax_adjoints(const Scratch<T>& s, PointBlock<T>* points) {
  Vec<T> products = {};
  for (int64_t block = 0; block < s.blocks; ++block)
    for (int64_t i = 0; i < BLOCK; i += LANES<T>)
      products += load(points[block].weight + i) * load(points[block].grad_weight + i);
  const T expected = sum_in_every_lane<T>(products)[0];
  for (int64_t block = 0; block < s.blocks; ++block) {
    PointBlock<T>& p = points[block];
    RK_INDEPENDENT
    for (int64_t i = 0; i < BLOCK; ++i) p.grad_weight[i] = softmax_adjoint(p.weight[i], p.grad_weight[i], expected);
  }
}

template <typename T>
void place_adjoints(const Args& args, const LevelBlock<T>& level, const PointBlock<T>& p, T* pairs) {
  RK_INDEPENDENT
  for (int64_t i = 0; i < BLOCK; ++i) {
    const T width = T(level.width[i]), height = T(level.height[i]), step = level.half_step[i];
    if (!args.fused) {
      pairs[2 * i] = location_adjoint(p.grad_x[i], width);
      pairs[2 * i + 1] = location_adjoint(p.grad_y[i], height);
    } else if (args.reference_size == 2) {
      pairs[2 * i] = point_adjoint(p.grad_x[i], width).offset;
      pairs[2 * i + 1] = point_adjoint(p.grad_y[i], height).offset;
    } else {  // a point that is nowhere may have an infinite box: 0 inf is NaN
      const T x = box_adjoint(p.grad_x[i], p.extent_x[i], p.offset_x[i], step, width).offset;
      const T y = box_adjoint(p.grad_y[i], p.extent_y[i], p.offset_y[i], step, height).offset;
      pairs[2 * i] = p.inside[i] ? x : T(0);
      pairs[2 * i + 1] = p.inside[i] ? y : T(0);
    }
  }
}

// Gradients of a block's references, one a point: [reference_size, BLOCK].
template <typename T>
void reference_adjoints(const Args& args, const LevelBlock<T>& level, const PointBlock<T>& p, T (*grad)[BLOCK]) {
  const bool box = args.reference_size == 4;
  RK_INDEPENDENT
  for (int64_t i = 0; i < BLOCK; ++i) {
    const T width = T(level.width[i]), height = T(level.height[i]), step = level.half_step[i];
    const BoxAdjoint<T> x = box_adjoint(p.grad_x[i], p.extent_x[i], p.offset_x[i], step, width);
    const BoxAdjoint<T> y = box_adjoint(p.grad_y[i], p.extent_y[i], p.offset_y[i], step, height);
    const bool adds = level.exists[i] & p.inside[i];
    grad[0][i] = adds ? (box ? x.center : point_adjoint(p.grad_x[i], width).reference) : T(0);
    grad[1][i] = adds ? (box ? y.center : point_adjoint(p.grad_y[i], height).reference) : T(0);
    grad[2][i] = adds ? x.extent : T(0);
    grad[3][i] = adds ? y.extent : T(0);
  }
}

// This query and head's part of grad_reference [reference_levels, reference_size].
template <typename T>
void write_reference_part(const Args& args, const Scratch<T>& s, const PointBlock<T>* points, T* grad_reference) {
  const int64_t size = args.reference_size;
  for (int64_t i = 0; i < args.reference_levels * size; ++i) grad_reference[i] = T(0);
  for (int64_t block = 0; block < s.blocks; ++block) {
    const LevelBlock<T>& level = s.levels[block];
    T grad[4][BLOCK];
    reference_adjoints(args, level, points[block], grad);
    for (int64_t j = 0; j < size; ++j) {
      if (args.reference_levels == 1) {
        Vec<T> sum = {};
        for (int64_t i = 0; i < BLOCK; i += LANES<T>) sum += load(grad[j] + i);
        grad_reference[j] += sum_in_every_lane<T>(sum)[0];
      } else {
        for (int64_t i = 0; i < BLOCK; ++i) grad_reference[level.level[i] * size + j] += grad[j][i];
      }
    }
  }
}

// `row` counts (batch, query, head) triples; grad_reference is null where not asked for.
template <typename T>
void write_gradients(const Args& args, int64_t row, const Scratch<T>& s, PointBlock<T>* points, T* grad_reference) {
  if (args.fused) softmax_adjoints(s, points);
  for (int64_t block = 0; block < s.blocks; ++block) {
    place_adjoints(args, s.levels[block], points[block], s.pairs + block * 2 * BLOCK);
    memcpy(s.singles + block * BLOCK, points[block].grad_weight, BLOCK * sizeof(T));
  }
  write_row(s.pairs, 2 * args.K, args.grad_places.dtype, args.grad_places.data, row * args.K * 2, T(1));
  write_row(s.singles, args.K, args.grad_weights.dtype, args.grad_weights.data, row * args.K, T(1));
  if (grad_reference != nullptr) write_reference_part(args, s, points, grad_reference);
}

}  // namespace
}  // namespace rk::ms_deform_attn::RK_SIMD
