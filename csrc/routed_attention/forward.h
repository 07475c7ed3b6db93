#pragma once
// The forward pass of a worker: an online softmax over tiles of keys, for every head of a block of queries.

#include "tiles.h"

namespace rk::routed_attention::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

inline float log2_of(float x) { return __builtin_log2f(x); }
inline double log2_of(double x) { return __builtin_log2(x); }

// Rows' maxima and sums while tiles of keys go by.
template <typename T>
struct OnlineSoftmax {
  int64_t heads;
  T* weights;     // [BLOCK_M, BLOCK_N] S_hij, then 2^(S_hij - max)
  T* maxima;      // [H, BLOCK_N]
  T* sums;        // [H, BLOCK_N] sum_j 2^(S_hij - max)
  T* correction;  // [BLOCK_N] 2^(old max - new max)

  OnlineSoftmax(Blocks& blocks, int64_t heads_)
      : heads(heads_), weights(blocks.take<T>(TILE_SIZE)), maxima(blocks.take<T>(heads * BLOCK_N)),
        sums(blocks.take<T>(heads * BLOCK_N)), correction(blocks.take<T>(BLOCK_N)) {}

  void start() const {
    for (int64_t i = 0; i < heads * BLOCK_N; ++i) maxima[i] = NOT_VISIBLE<T>, sums[i] = 0;
  }

  // The keys of a tile, for one head: afterwards `weights` are theirs.
  void add(
      const QueryRows<T>& query, const BiasTile<T>& tile, const Place& at, int64_t h, const Matrix<T>& key,
      const T* bias) const {
    if (bias == nullptr) add_tile<false, false>(query, at, h, key, bias);
    else if (tile.masked) add_tile<true, true>(query, at, h, key, bias);
    else add_tile<true, false>(query, at, h, key, bias);
  }

 private:
  // weights = 2^(S - max) in one pass, by the maximum that the tiles before this one left: its weights may be somewhat
  // above 1. False where that will not do: a query has seen no key yet or masked ones only, or a logit is far above the
  // maximum.
  template <bool BIASED, bool MASKED>
  bool weights_by_old_maximum(
      const QueryRows<T>& query, const Place& at, int64_t h, const Matrix<T>& key, const T* bias) const {
    constexpr T FAR_ABOVE = 8;
    T* row_max = maxima + h * BLOCK_N;
    T* row_sum = sums + h * BLOCK_N;
    for (int64_t i = 0; i < at.columns; i += LANES<T>)
      if (any<T>(load(row_max + i) < T(FAR_BELOW))) return false;

    Vec<T> largest[BLOCK_N / LANES<T>] = {}, sum[BLOCK_N / LANES<T>] = {};
    gemm<T>(
        at.count, at.columns, query.columns, key, {query.flipped_of_head(h), BLOCK_N},
        [&](int64_t j, int64_t i)
            RK_INLINE { return BIASED ? load(bias + j * BLOCK_N + i) - load(row_max + i) : -load(row_max + i); },
        [&](int64_t j, int64_t i, Vec<T> logit) RK_INLINE {
          if constexpr (MASKED) logit = where_visible<T>(logit, load(bias + j * BLOCK_N + i));
          const Vec<T> weight = exp2_nonpositive(logit);
          store(weights + j * BLOCK_N + i, weight);
          largest[i / LANES<T>] = max<T>(logit, largest[i / LANES<T>]);
          sum[i / LANES<T>] += weight;
        });
    for (int64_t i = 0; i < at.columns; i += LANES<T>)
      if (any<T>(largest[i / LANES<T>] > FAR_ABOVE)) return false;
    for (int64_t i = 0; i < at.columns; i += LANES<T>) {
      store(row_sum + i, load(row_sum + i) + sum[i / LANES<T>]);
      store(correction + i, broadcast(T(1)));
    }
    return true;
  }

  // Online softmax over the keys of a tile, 16 queries at a time: weights = 2^(S - max).
  template <bool BIASED, bool MASKED>
  void add_tile(const QueryRows<T>& query, const Place& at, int64_t h, const Matrix<T>& key, const T* bias) const {
    if (weights_by_old_maximum<BIASED, MASKED>(query, at, h, key, bias)) return;
    Vec<T> largest[BLOCK_N / LANES<T>];
    for (Vec<T>& of_queries : largest) of_queries = broadcast(NOT_VISIBLE<T>);
    gemm<T>(
        at.count, at.columns, query.columns, key, {query.flipped_of_head(h), BLOCK_N},
        [&](int64_t j, int64_t i) RK_INLINE { return BIASED && !MASKED ? load(bias + j * BLOCK_N + i) : Vec<T>{}; },
        [&](int64_t j, int64_t i, Vec<T> logit) RK_INLINE {
          if constexpr (MASKED) logit = masked_logit<T>(logit, load(bias + j * BLOCK_N + i));
          store(weights + j * BLOCK_N + i, logit);
          largest[i / LANES<T>] = max<T>(logit, largest[i / LANES<T>]);
        });

    constexpr int64_t CHAINS = 4;  // independent sums, against the latency of one
    T* row_max = maxima + h * BLOCK_N;
    T* row_sum = sums + h * BLOCK_N;
    for (int64_t i = 0; i < at.columns; i += LANES<T>) {
      const Vec<T> before = load(row_max + i);
      const Vec<T> now = max<T>(largest[i / LANES<T>], before);
      const Vec<T> shift = now == NOT_VISIBLE<T> ? Vec<T>{} : now;
      const Vec<T> factor = before == now ? broadcast(T(1)) : exp2_nonpositive(before - shift);

      Vec<T> sum[CHAINS] = {};
      const auto exponentiate = [&](int64_t j, int64_t chain) {
        T* weight = weights + j * BLOCK_N + i;
        store(weight, exp2_nonpositive(load(weight) - shift));
        sum[chain] += load(weight);
      };
      int64_t j = 0;
      for (; j + CHAINS <= at.count; j += CHAINS)
        for (int64_t c = 0; c < CHAINS; ++c) exponentiate(j + c, c);
      for (; j < at.count; ++j) exponentiate(j, 0);
      store(row_max + i, now);
      store(row_sum + i, load(row_sum + i) * factor + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
      store(correction + i, factor);
    }
  }
};

template <typename T>
struct ForwardScratch {
  BiasTile<T> bias;
  QueryRows<T> query;   // [H, BLOCK_N, D] scale log2(e) q
  QueryRows<T> output;  // [H, BLOCK_N, D] sum_j 2^(S_hij - max) v_hj
  OnlineSoftmax<T> softmax;
  T* key;    // [BLOCK_M, D]
  T* value;  // [BLOCK_M, D]

  ForwardScratch(Blocks& blocks, const Args& a)
      : bias(blocks, a), query(blocks, a.heads, a.channels, true), output(blocks, a.heads, a.channels, false),
        softmax(blocks, a.heads), key(blocks.take<T>(BLOCK_M * query.padded_columns)),
        value(blocks.take<T>(BLOCK_M * query.padded_columns)) {}
};

template <typename T>
struct Forward {
  const Args& a;
  int64_t scratch_bytes;

  explicit Forward(const Args& args) : a(args) {
    Blocks counting(nullptr);
    ForwardScratch<T>(counting, a);
    scratch_bytes = counting.used + ALIGNMENT;
  }

  int64_t workspace_bytes() const { return a.parallel.workers * scratch_bytes; }

  // A large logit sends its whole block the other way, so blocks too are cut by the shapes: few images into 16
  // together.
  int64_t parts_of_image() const {
    const int64_t units = (a.queries + UNIT - 1) / UNIT, whole = (a.queries + BLOCK_N - 1) / BLOCK_N;
    return larger(larger(whole, smaller((15 + a.batch) / larger(a.batch, 1), (units + 1) / 2)), 1);
  }

  void attend(int64_t worker) const {
    Blocks own(a.workspace + worker * scratch_bytes);
    ForwardScratch<T> s(own, a);
    const int64_t parts = parts_of_image();
    for_groups(a.batch, parts, worker, a.parallel.workers, [&](int64_t b, const Share& mine) {
      for (int64_t part = mine.begin; part < mine.end; ++part)
        for_blocks(a, part, parts, [&](int64_t first, int64_t rows) {
          attend_block(s, {b, first, rows, round_up_to_lanes<T>(rows)});
        });
    });
  }

  void attend_block(ForwardScratch<T>& s, const Place& block) const {
    s.query.read(
        a.query, start_of(a.query, block), a.query.stride[1], a.query.stride[2], block.rows, T(a.scale * LOG2_E));
    s.bias.read_queries(a, block);
    s.output.clear();
    s.softmax.start();
    for_tiles_of<T>(a, block, [&](const Place& at) {
      s.bias.compute(a, at, false);
      for (int64_t h = 0; h < a.heads; ++h) attend_tile(s, at, h);
    });
    finish(s, block);
  }

  void attend_tile(ForwardScratch<T>& s, const Place& at, int64_t h) const {
    const int64_t padded = s.query.padded_columns;
    const Matrix<T> key =
        key_rows<T>(a.key, start_of_head(a.key, at, h), a.key.stride[2], a.channels, at, s.key, false);
    const Matrix<T> value =
        key_rows<T>(a.value, start_of_head(a.value, at, h), a.value.stride[2], a.channels, at, s.value, true);
    s.softmax.add(s.query, s.bias, at, h, key, s.bias.of_head(a, at, h));
    T* output = s.output.of_head(h);
    gemm<T>(
        at.rows, padded, at.count, {s.softmax.weights, 1, BLOCK_N}, value,
        [&](int64_t i, int64_t d, Vec<T> sum) RK_INLINE {
          T* to = output + i * padded + d;
          store(to, load(to) * s.softmax.correction[i] + sum);
        });
  }

  // O = output / sum, lse = ln(2) (max + log2(sum)); a query that attended nothing gives 0 and lse = +inf, so that
  // exp(S - lse) is 0 in backward.
  void finish(const ForwardScratch<T>& s, const Place& block) const {
    T* lse = static_cast<T*>(a.lse.data) + start_of(a.lse, block);
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < block.rows; ++i) {
        const T sum = s.softmax.sums[h * BLOCK_N + i];
        lse[h * a.lse.stride[1] + i * a.lse.stride[2]] =
            sum == 0 ? -NOT_VISIBLE<T> : T(LN_2) * (s.softmax.maxima[h * BLOCK_N + i] + log2_of(sum));
        write_row<T>(
            s.output.of_head(h) + i * s.output.padded_columns, a.channels, a.output.dtype, a.output.data,
            start_of(a.output, block) + h * a.output.stride[1] + i * a.output.stride[2], sum == 0 ? T(0) : 1 / sum);
      }
  }

  void run() const {
    a.parallel.each([this](int64_t worker) { attend(worker); });
  }
};

}  // namespace
}  // namespace rk::routed_attention::RK_SIMD
