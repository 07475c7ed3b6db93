#pragma once
// What forward and backward share: packed keys, the tile of the bias (computed once for all heads) and its masks.

#include "../common/gemm.h"
#include "../common/rows.h"
#include "args.h"
#include "math.h"

namespace rk {
namespace RK_SIMD {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

constexpr int64_t BLOCK_N = 64;   // queries of a tile
constexpr int64_t BLOCK_M = 128;  // keys of a tile: logits, their gradient, bias and its gradient fill one L1

// Rows of a tile lie one cache line more than BLOCK_M apart: a power of two would send them all to the same sets.
template <typename T>
constexpr int64_t TILE_ROW = BLOCK_M + ALIGNMENT / int64_t(sizeof(T));

template <typename T>
constexpr int64_t TILE_SIZE = BLOCK_N * TILE_ROW<T>;

// Calls block(b, first, rows) for the queries of one worker: equal shares of all B * N, cut at multiples of 8 rows and
// walked in blocks of at most BLOCK_N that do not cross images.
template <typename Block>
inline void for_blocks_of(const RoutedAttention& a, int64_t worker, Block block) {
  constexpr int64_t UNIT = 8;
  const int64_t units_of_image = blocks_of(a.queries, UNIT);
  const Share share = share_of(a.batch * units_of_image, worker, a.parallel.workers);
  for (int64_t unit = share.begin; unit < share.end;) {
    const int64_t b = unit / units_of_image, first = unit % units_of_image;
    const int64_t units = smaller(smaller(BLOCK_N / UNIT, share.end - unit), units_of_image - first);
    block(b, first * UNIT, smaller(units * UNIT, a.queries - first * UNIT));
    unit += units;
  }
}

// Whether a worker's share has queries of image b.
inline bool works_on(const RoutedAttention& a, int64_t worker, int64_t b) {
  bool found = false;
  for_blocks_of(a, worker, [&](int64_t image, int64_t, int64_t) { found = found || image == b; });
  return found;
}

// A [B, (H,) M, columns] tensor in the accumulate type, rows padded to whole vectors, and its transpose tile by tile.
template <typename T>
struct PackedKeys {
  int64_t columns, padded_columns, tiles;
  T* rows;     // [B * H, tiles * BLOCK_M, padded_columns], or null
  T* flipped;  // [B * H, tiles, columns, TILE_ROW], or null

  PackedKeys(Blocks& blocks, int64_t slices, int64_t keys, int64_t width, bool want_rows, bool want_flipped)
      : columns(width), padded_columns(round_up_to_lanes<T>(width)), tiles(blocks_of(keys, BLOCK_M)),
        rows(want_rows ? blocks.take<T>(slices * tiles * BLOCK_M * padded_columns) : nullptr),
        flipped(want_flipped ? blocks.take<T>(slices * tiles * columns * TILE_ROW<T>) : nullptr) {}

  T* rows_at(int64_t slice, int64_t key) const { return rows + (slice * tiles * BLOCK_M + key) * padded_columns; }
  T* flipped_at(int64_t slice, int64_t key) const {
    return flipped + (slice * tiles + key / BLOCK_M) * columns * TILE_ROW<T>;
  }

  // The tile of keys [first, first + count) of one slice; what lies beyond `count` becomes zero.
  void pack(const View& view, int64_t slice, int64_t offset, int64_t row_stride, int64_t first, int64_t count,
            T* scratch) const {
    T* to = rows != nullptr ? rows_at(slice, first) : scratch;
    for (int64_t j = 0; j < count; ++j)
      read_row<T>(
          to + j * padded_columns, columns, padded_columns, view.dtype, view.data, offset + (first + j) * row_stride,
          T(1));
    memset(to + count * padded_columns, 0, size_t((BLOCK_M - count) * padded_columns) * sizeof(T));
    if (flipped != nullptr) transpose(to, padded_columns, BLOCK_M, columns, flipped_at(slice, first), TILE_ROW<T>);
  }
};

template <typename T>
struct PackedFactors {
  PackedKeys<T> sup, del, gate;

  PackedFactors(Blocks& blocks, const RoutedAttention& a, bool want_rows)
      : sup(blocks, a.batch, a.keys, a.sup_rank, want_rows, true),
        del(blocks, a.batch, a.keys, a.del_rank, want_rows, true),
        gate(blocks, a.batch, a.keys, a.gate_rank, want_rows, true) {}
};

// A block of query rows of every head, [H, BLOCK_N, padded_columns], in the accumulate type (factors: H = 1).
template <typename T>
struct QueryRows {
  int64_t heads, columns, padded_columns;
  T* data;

  QueryRows(Blocks& blocks, int64_t heads_, int64_t width)
      : heads(heads_), columns(width), padded_columns(round_up_to_lanes<T>(width)),
        data(blocks.take<T>(heads_ * BLOCK_N * padded_columns)) {}

  T* of_head(int64_t h) const { return data + h * BLOCK_N * padded_columns; }

  void read(const View& view, int64_t offset, int64_t head_stride, int64_t row_stride, int64_t rows, T factor) const {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < rows; ++i)
        read_row<T>(
            of_head(h) + i * padded_columns, columns, padded_columns, view.dtype, view.data,
            offset + h * head_stride + i * row_stride, factor);
  }
  void write(const View& view, int64_t offset, int64_t head_stride, int64_t row_stride, int64_t rows, T factor) const {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < rows; ++i)
        write_row<T>(
            of_head(h) + i * padded_columns, columns, view.dtype, view.data, offset + h * head_stride + i * row_stride,
            factor);
  }
  void clear() const { memset(data, 0, size_t(heads * BLOCK_N * padded_columns) * sizeof(T)); }
};

template <typename T>
constexpr T NOT_VISIBLE = -T(__builtin_inff());

// One tile of what is added to the logits, [rows, BLOCK_M], and what backward needs of it.
template <typename T>
struct BiasTile {
  QueryRows<T> sup_q, del_q, gate_q;  // [BLOCK_N, R], [BLOCK_N, R], [BLOCK_N, G]
  T* shared;                          // [BLOCK_N, BLOCK_M] bias and masks that all heads have in common
  T* of_one_head;                     // [BLOCK_N, BLOCK_M] the same and the mask of one head
  T* p;                               // [BLOCK_N, BLOCK_M] gate; for backward p
  T* sup;                             // [BLOCK_N, BLOCK_M] suppressor products; for backward sup - del
  T* del;                             // [BLOCK_N, BLOCK_M] delegator products; for backward r, before the clamp
  bool filled = false;                // something is to be added to the logits
  bool masked = false;                // some of it is NOT_VISIBLE by a mask
  int64_t columns = 0;                // keys of this tile, rounded up to whole vectors

  BiasTile(Blocks& blocks, const RoutedAttention& a)
      : sup_q(blocks, 1, a.sup_rank), del_q(blocks, 1, a.del_rank), gate_q(blocks, 1, a.gate_rank),
        shared(blocks.take<T>(TILE_SIZE<T>)), of_one_head(blocks.take<T>(TILE_SIZE<T>)),
        p(blocks.take<T>(TILE_SIZE<T>)), sup(blocks.take<T>(TILE_SIZE<T>)),
        del(blocks.take<T>(TILE_SIZE<T>)) {}

  void read_queries(const RoutedAttention& a, int64_t b, int64_t first, int64_t rows) {
    if (!a.routed) return;
    const QueryRows<T>* factors[] = {&sup_q, &del_q, &gate_q};
    const View* views[] = {&a.sup_q, &a.del_q, &a.gate_q};
    for (int i = 0; i < 3; ++i) {
      const View& view = *views[i];
      factors[i]->read(view, b * view.stride[0] + first * view.stride[1], 0, view.stride[1], rows, T(1));
    }
  }

  // Queries [first, first + rows) of image b against keys [key, key + BLOCK_M).
  void compute(const RoutedAttention& a, const PackedFactors<T>& keys, int64_t b, int64_t first, int64_t rows,
               int64_t key) {
    const int64_t count = smaller(BLOCK_M, a.keys - key);
    columns = round_up_to_lanes<T>(count);
    filled = a.routed;
    masked = a.key_ranges.data != nullptr || a.attn_mask.data != nullptr;
    if (a.routed) compute_routes(a, keys, b, rows, key);
    if (count < columns) hide_padding(rows, count);
    if (a.key_ranges.data != nullptr) hide_outside_ranges(a, b, first, rows, key);
    if (a.attn_mask.data == nullptr) return;
    fill(rows);
    if (!mask_differs_by_head(a)) add_mask(a, b, 0, first, rows, key, shared);
  }

  // What is added to the logits of head h, or null where nothing is.
  const T* of_head(const RoutedAttention& a, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t key) const {
    if (a.attn_mask.data == nullptr || !mask_differs_by_head(a)) return filled ? shared : nullptr;
    memcpy(of_one_head, shared, size_t(rows * TILE_ROW<T>) * sizeof(T));
    add_mask(a, b, h, first, rows, key, of_one_head);
    return of_one_head;
  }

  // Whether some query of the block may attend some key of the tile, by its key ranges.
  static bool sees(const RoutedAttention& a, int64_t b, int64_t first, int64_t rows, int64_t key) {
    if (a.key_ranges.data == nullptr) return true;
    const int64_t end = smaller(key + BLOCK_M, a.keys);
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t* range = ranges_of(a, b, first + i);
      for (int k = 0; k < 4; k += 2)
        if (range[k] < range[k + 1] && range[k] < end && key < range[k + 1]) return true;
    }
    return false;
  }

 private:
  static bool mask_differs_by_head(const RoutedAttention& a) { return a.attn_mask.stride[1] != 0 && a.heads > 1; }

  static const int32_t* ranges_of(const RoutedAttention& a, int64_t b, int64_t query) {
    return static_cast<const int32_t*>(a.key_ranges.data) + b * a.key_ranges.stride[0] + query * a.key_ranges.stride[1];
  }

  void compute_routes(const RoutedAttention& a, const PackedFactors<T>& keys, int64_t b, int64_t rows, int64_t key) {
    const PackedKeys<T>* packed[] = {&keys.sup, &keys.del, &keys.gate};
    const QueryRows<T>* queries[] = {&sup_q, &del_q, &gate_q};
    T* products[] = {sup, del, p};
    for (int i = 0; i < 3; ++i)
      gemm<T, false>(
          rows, columns, packed[i]->columns, queries[i]->data, queries[i]->padded_columns, 1,
          packed[i]->flipped_at(b, key), TILE_ROW<T>, products[i], TILE_ROW<T>);
    const Vec<T> limit = broadcast(a.clamped ? T(a.limit) : T(__builtin_inff()));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t e = i * TILE_ROW<T>; e < i * TILE_ROW<T> + columns; e += LANES<T>) {
        const Vec<T> gate = load(p + e), suppressor = load(sup + e), delegator = load(del + e);
        const Vec<T> probability = sigmoid_of_decay(gate, exp_nonpositive(gate < 0 ? gate : -gate));
        const Vec<T> r = route(probability, suppressor, delegator);
        store(shared + e, clamp(r, limit));
        store(p + e, probability), store(sup + e, suppressor - delegator), store(del + e, r);
      }
  }

  void fill(int64_t rows) {
    if (!filled) memset(shared, 0, size_t(rows * TILE_ROW<T>) * sizeof(T));
    filled = true;
  }

  void hide_padding(int64_t rows, int64_t count) {
    fill(rows);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = count; j < columns; ++j) shared[i * TILE_ROW<T> + j] = NOT_VISIBLE<T>;
  }

  void hide_outside_ranges(const RoutedAttention& a, int64_t b, int64_t first, int64_t rows, int64_t key) {
    fill(rows);
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t* range = ranges_of(a, b, first + i);
      T* row = shared + i * TILE_ROW<T>;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = key + j;
        const bool visible = (range[0] <= at && at < range[1]) || (range[2] <= at && at < range[3]);
        row[j] = visible ? row[j] : NOT_VISIBLE<T>;
      }
    }
  }

  void add_mask(const RoutedAttention& a, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t key,
                T* tile) const {
    const View& mask = a.attn_mask;
    const int64_t count = smaller(BLOCK_M, a.keys - key), step = mask.stride[3];
    for (int64_t i = 0; i < rows; ++i) {
      T* row = tile + i * TILE_ROW<T>;
      const int64_t offset = b * mask.stride[0] + h * mask.stride[1] + (first + i) * mask.stride[2] + key * step;
      if (mask.dtype == DType::boolean) {
        const uint8_t* may_attend = static_cast<const uint8_t*>(mask.data) + offset;
        for (int64_t j = 0; j < count; ++j) row[j] = may_attend[j * step] ? row[j] : NOT_VISIBLE<T>;
      } else {
        with_storage(mask.dtype, [&](auto type) {
          using Storage = decltype(type);
          const Storage* added = static_cast<const Storage*>(mask.data) + offset;
          for (int64_t j = 0; j < count; ++j) row[j] += load_as<T>(added[j * step]);
        });
      }
    }
  }
};

// logits + bias; behind a mask NOT_VISIBLE wins over any content of the key, even NaN.
template <typename T, bool MASKED>
inline Vec<T> add_bias(Vec<T> logits, Vec<T> bias) {
  const Vec<T> sum = logits + bias;
  return MASKED ? (bias == NOT_VISIBLE<T> ? bias : sum) : sum;
}

// Columns of the widest row that passes through a worker's packing buffer.
template <typename T>
inline int64_t widest_row(const RoutedAttention& a) {
  int64_t widest = a.channels;
  widest = a.sup_rank > widest ? a.sup_rank : widest;
  widest = a.del_rank > widest ? a.del_rank : widest;
  widest = a.gate_rank > widest ? a.gate_rank : widest;
  return round_up_to_lanes<T>(widest);
}

// One tensor of keys to be packed; factors have one "head".
template <typename T>
struct Packing {
  const PackedKeys<T>* to;
  const View* from;
  int64_t heads, head_stride, row_stride;
};

template <typename T>
struct PackedInputs {
  PackedKeys<T> key, value;
  PackedFactors<T> factors;

  PackedInputs(Blocks& blocks, const RoutedAttention& a, bool for_backward)
      : key(blocks, a.batch * a.heads, a.keys, a.channels, for_backward, true),
        value(blocks, a.batch * a.heads, a.keys, a.channels, !for_backward, for_backward),
        factors(blocks, a, for_backward) {}

  // Each worker packs its share of (slice, tile) pairs of every tensor.
  void pack(const RoutedAttention& a, T* scratch, int64_t worker) const {
    const Packing<T> jobs[] = {
        {&key, &a.key, a.heads, a.key.stride[1], a.key.stride[2]},
        {&value, &a.value, a.heads, a.value.stride[1], a.value.stride[2]},
        {&factors.sup, &a.sup_k, 1, 0, a.sup_k.stride[1]},
        {&factors.del, &a.del_k, 1, 0, a.del_k.stride[1]},
        {&factors.gate, &a.gate_k, 1, 0, a.gate_k.stride[1]},
    };
    const int64_t tiles = blocks_of(a.keys, BLOCK_M);
    for (const Packing<T>& job : jobs) {
      if (job.from->data == nullptr) continue;
      const Share share = share_of(a.batch * job.heads * tiles, worker, a.parallel.workers);
      for (int64_t item = share.begin; item < share.end; ++item) {
        const int64_t slice = item / tiles, first = item % tiles * BLOCK_M;
        const int64_t offset = slice / job.heads * job.from->stride[0] + slice % job.heads * job.head_stride;
        job.to->pack(*job.from, slice, offset, job.row_stride, first, smaller(BLOCK_M, a.keys - first), scratch);
      }
    }
  }
};

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
