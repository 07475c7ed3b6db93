#pragma once
// A worker's tiles. A tile holds pairs of 64 keys (rows) and 128 queries (columns): a vector holds 16 queries of one
// key, so that maxima and sums over keys need no reduction within a vector, and keys are read as they lie, a row a key.

#include "../common/gemm.h"
#include "../common/rows.h"
#include "args.h"
#include "math.h"

namespace rk::routed_attention::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

constexpr int64_t BLOCK_N = 128;  // queries of a tile
constexpr int64_t UNIT = 16;      // queries that are never parted
constexpr int64_t BLOCK_M = 64;   // keys of a tile
constexpr int64_t TILE_SIZE = BLOCK_M * BLOCK_N;

// Calls block(first, rows) for a part of an image's queries: near-equal parts, cut at multiples of UNIT rows and walked
// in blocks of at most BLOCK_N.
template <typename Block>
inline void for_blocks(const Args& a, int64_t part, int64_t parts, const Block& block) {
  const Share share = share_of((a.queries + UNIT - 1) / UNIT, part, parts);
  const int64_t end = smaller(share.end * UNIT, a.queries);
  for (int64_t first = share.begin * UNIT; first < end; first += BLOCK_N) block(first, smaller(BLOCK_N, end - first));
}

// Where a block of queries meets a tile of keys.
struct Place {
  int64_t b, first, rows;      // queries [first, first + rows) of image b
  int64_t columns;             // rows, rounded up to whole vectors
  int64_t key = 0, count = 0;  // keys [key, key + count)
};

// A block of query rows of every head in the accumulate type (factors: one head).
template <typename T>
struct QueryRows {
  int64_t heads, columns, padded_columns;
  T* rows;     // [H, BLOCK_N, padded_columns]
  T* flipped;  // [H, columns, BLOCK_N], zeros beyond the last query; or null

  QueryRows(Blocks& blocks, int64_t heads_, int64_t width, bool want_flipped)
      : heads(heads_), columns(width), padded_columns(round_up_to_lanes<T>(width)),
        rows(blocks.take<T>(heads_ * BLOCK_N * padded_columns)),
        flipped(want_flipped ? blocks.take<T>(heads_ * width * BLOCK_N) : nullptr) {}

  T* of_head(int64_t h) const { return rows + h * BLOCK_N * padded_columns; }
  T* flipped_of_head(int64_t h) const { return flipped + h * columns * BLOCK_N; }

  void read(const View& view, int64_t offset, int64_t head_stride, int64_t row_stride, int64_t count, T factor) const {
    for (int64_t h = 0; h < heads; ++h) {
      T* to = of_head(h);
      for (int64_t i = 0; i < count; ++i)
        read_row<T>(
            to + i * padded_columns, columns, padded_columns, view.dtype, view.data,
            offset + h * head_stride + i * row_stride, factor);
      if (flipped == nullptr) continue;
      memset(to + count * padded_columns, 0, size_t((BLOCK_N - count) * padded_columns) * sizeof(T));
      transpose(to, padded_columns, BLOCK_N, columns, flipped_of_head(h), BLOCK_N);
    }
  }
  void write(const View& view, int64_t offset, int64_t head_stride, int64_t row_stride, int64_t count, T factor) const {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < count; ++i)
        write_row<T>(
            of_head(h) + i * padded_columns, columns, view.dtype, view.data, offset + h * head_stride + i * row_stride,
            factor);
  }
  void clear() const { memset(rows, 0, size_t(heads * BLOCK_N * padded_columns) * sizeof(T)); }
};

// Keys [key, key + count) as they lie where they are of type T, else converted into `copy`.
template <typename T>
inline Matrix<T> key_rows(
    const View& view, int64_t offset, int64_t row_stride, int64_t width, const Place& at, T* copy, bool must_copy) {
  const int64_t start = offset + at.key * row_stride, padded = round_up_to_lanes<T>(width);
  const bool is_t = view.dtype == DTYPE_OF<T>;
  const bool dense = row_stride == width && width == padded;
  if (is_t && (dense || !must_copy)) return {static_cast<const T*>(view.data) + start, row_stride};
  read_rows<T>(copy, at.count, width, padded, view.dtype, view.data, start, row_stride);
  return {copy, padded};
}

template <typename T>
constexpr T NOT_VISIBLE = -T(__builtin_inff());

// Logits are kept times log2(e), so that exp is 2^logit.
constexpr double LOG2_E = 1.44269504088896340736, LN_2 = 0.69314718055994530942;

// Where a mask leaves a row's maximum below this, lse = max + log2(sum) loses the sum: at -1e9 a float has steps of 64.
constexpr double FAR_BELOW = -4096;

// An additive mask times log2(e); where that would be -inf though the mask is finite, a line of half the slope goes on.
template <typename T, typename Storage>
inline T mask_logit(Storage stored) {
  constexpr T POWER = sizeof(T) == 8 ? T(0x1p1023) : T(0x1p127);  // half of what is too large
  T mask = load_as<T>(stored);
  if constexpr (sizeof(Storage) > sizeof(T))
    if (mask == NOT_VISIBLE<T> && stored != NOT_VISIBLE<Storage>) mask = -T(__FLT_MAX__);
  return mask > -POWER ? mask * T(LOG2_E) : mask / 2 - T(LOG2_E - 0.5) * POWER;
}

// One factor pair: its queries of the block, its keys of the tile, and their products.
template <typename T>
struct FactorTile {
  QueryRows<T> queries;  // [BLOCK_N, R]
  T* copy;               // [BLOCK_M, padded R]
  T* products;           // [BLOCK_M, BLOCK_N]
  Matrix<T> keys{};

  FactorTile(Blocks& blocks, int64_t rank)
      : queries(blocks, 1, rank, true), copy(blocks.take<T>(BLOCK_M * queries.padded_columns)),
        products(blocks.take<T>(TILE_SIZE)) {}

  void read_queries(const View& view, const Place& at) const {
    queries.read(view, at.b * view.stride[0] + at.first * view.stride[1], 0, view.stride[1], at.rows, T(1));
  }

  void read_keys(const View& view, const Place& at, bool for_backward) {
    keys = key_rows<T>(view, at.b * view.stride[0], view.stride[1], queries.columns, at, copy, for_backward);
  }

  // Calls finish(key, query, product) for every vector of products.
  template <typename Finish>
  RK_INLINE void multiply(const Place& at, const Finish& finish) const {
    gemm<T>(at.count, at.columns, queries.columns, keys, {queries.flipped, BLOCK_N}, finish);
  }

  void multiply(const Place& at) const {
    multiply(
        at, [this](int64_t j, int64_t i, Vec<T> product) RK_INLINE { store(products + j * BLOCK_N + i, product); });
  }
};

// The summand of one tile's logits, [BLOCK_M, BLOCK_N], times log2(e), and what backward needs of it.
template <typename T>
struct BiasTile {
  FactorTile<T> sup;    // for backward its products become sup - del
  FactorTile<T> del;    // for backward its products become r, before the clamp
  FactorTile<T> gate;   // for backward its products become p
  T* shared;            // bias and masks that all heads have in common
  T* of_one_head;       // the same and the mask of one head
  bool filled = false;  // something is to be added to the logits
  bool masked = false;  // some of it may be NOT_VISIBLE

  BiasTile(Blocks& blocks, const Args& a)
      : sup(blocks, a.sup_rank), del(blocks, a.del_rank), gate(blocks, a.gate_rank), shared(blocks.take<T>(TILE_SIZE)),
        of_one_head(blocks.take<T>(TILE_SIZE)) {}

  void read_queries(const Args& a, const Place& at) const {
    if (!a.routed) return;
    sup.read_queries(a.sup_q, at), del.read_queries(a.del_q, at), gate.read_queries(a.gate_q, at);
  }

  void compute(const Args& a, const Place& at, bool for_backward) {
    filled = a.routed;
    masked = a.key_ranges.data != nullptr || a.attn_mask.data != nullptr;
    if (a.routed) compute_routes(a, at, for_backward);
    if (!masked) return;
    if (!filled) memset(shared, 0, size_t(at.count * BLOCK_N) * sizeof(T));
    filled = true;
    if (a.key_ranges.data != nullptr) hide_outside_ranges(a, at);
    if (a.attn_mask.data != nullptr && !mask_differs_by_head(a)) add_mask(a, at, 0, shared);
  }

  // The summand of the logits of head h, or null where there is none.
  const T* of_head(const Args& a, const Place& at, int64_t h) const {
    if (a.attn_mask.data == nullptr || !mask_differs_by_head(a)) return filled ? shared : nullptr;
    memcpy(of_one_head, shared, size_t(at.count * BLOCK_N) * sizeof(T));
    add_mask(a, at, h, of_one_head);
    return of_one_head;
  }

  // Whether some query of the block may attend some key of the tile, by its key ranges.
  static bool sees(const Args& a, const Place& at) {
    if (a.key_ranges.data == nullptr) return true;
    for (int64_t i = 0; i < at.rows; ++i) {
      const int32_t* range = ranges_of(a, at, i);
      for (int k = 0; k < 4; k += 2)
        if (range[k] < range[k + 1] && range[k] < at.key + at.count && at.key < range[k + 1]) return true;
    }
    return false;
  }

 private:
  static bool mask_differs_by_head(const Args& a) { return a.attn_mask.stride[1] != 0 && a.heads > 1; }

  static const int32_t* ranges_of(const Args& a, const Place& at, int64_t row) {
    return static_cast<const int32_t*>(a.key_ranges.data) + at.b * a.key_ranges.stride[0] +
        (at.first + row) * a.key_ranges.stride[1];
  }

  void compute_routes(const Args& a, const Place& at, bool for_backward) {
    sup.read_keys(a.sup_k, at, for_backward), del.read_keys(a.del_k, at, for_backward);
    gate.read_keys(a.gate_k, at, for_backward);
    sup.multiply(at), del.multiply(at);
    const Vec<T> limit = broadcast(T(a.limit));
    const T strength = T(a.strength * LOG2_E);
    gate.multiply(at, [&](int64_t j, int64_t i, Vec<T> logit) RK_INLINE {
      const int64_t e = j * BLOCK_N + i;
      const Vec<T> suppressor = load(sup.products + e), delegator = load(del.products + e);
      const Vec<T> decay = exp2_nonpositive((logit < 0 ? logit : -logit) * T(LOG2_E));
      const Vec<T> p = sigmoid_of_decay(logit, decay, reciprocal(1 + decay));
      const Vec<T> r = route(p, suppressor, delegator);
      store(shared + e, clamp(r, limit) * strength);
      if (!for_backward) return;
      store(gate.products + e, p), store(sup.products + e, suppressor - delegator), store(del.products + e, r);
    });
  }

  void hide_outside_ranges(const Args& a, const Place& at) const {
    for (int64_t i = 0; i < at.rows; ++i) {
      const int32_t* range = ranges_of(a, at, i);
      for (int64_t j = 0; j < at.count; ++j) {
        const int64_t key = at.key + j;
        const bool visible = (range[0] <= key && key < range[1]) || (range[2] <= key && key < range[3]);
        if (!visible) shared[j * BLOCK_N + i] = NOT_VISIBLE<T>;
      }
    }
  }

  static void add_mask(const Args& a, const Place& at, int64_t h, T* tile) {
    const View& mask = a.attn_mask;
    const int64_t step = mask.stride[3];
    for (int64_t i = 0; i < at.rows; ++i) {
      const int64_t offset =
          at.b * mask.stride[0] + h * mask.stride[1] + (at.first + i) * mask.stride[2] + at.key * step;
      if (mask.dtype == DType::boolean) {
        const uint8_t* may_attend = static_cast<const uint8_t*>(mask.data) + offset;
        for (int64_t j = 0; j < at.count; ++j)
          if (!may_attend[j * step]) tile[j * BLOCK_N + i] = NOT_VISIBLE<T>;
      } else {
        with_storage(mask.dtype, [&](auto type) {
          using Storage = decltype(type);
          const Storage* added = static_cast<const Storage*>(mask.data) + offset;
          for (int64_t j = 0; j < at.count; ++j) tile[j * BLOCK_N + i] += mask_logit<T>(added[j * step]);
        });
      }
    }
  }
};

// Behind a mask NOT_VISIBLE wins over any content of the key, even NaN.
template <typename T>
inline Vec<T> where_visible(Vec<T> biased_logits, Vec<T> bias) {
  return bias == NOT_VISIBLE<T> ? bias : biased_logits;
}

// S. A mask is added last: added first, -1e9 would round every step of the product, and finfo.min swallows it anyway.
template <typename T>
inline Vec<T> masked_logit(Vec<T> product, Vec<T> bias) {
  return where_visible<T>(product + bias, bias);
}

inline int64_t start_of(const View& view, const Place& at) { return at.b * view.stride[0] + at.first * view.stride[2]; }
inline int64_t start_of_head(const View& view, const Place& at, int64_t h) {
  return at.b * view.stride[0] + h * view.stride[1];
}

// Calls tile(place) for every tile of keys that a query of the block may see.
template <typename T, typename Tile>
inline void for_tiles_of(const Args& a, Place at, Tile tile) {
  for (at.key = 0; at.key < a.keys; at.key += BLOCK_M) {
    at.count = smaller(BLOCK_M, a.keys - at.key);
    if (BiasTile<T>::sees(a, at)) tile(at);
  }
}

}  // namespace
}  // namespace rk::routed_attention::RK_SIMD
