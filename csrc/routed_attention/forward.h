#pragma once
// The forward pass of a worker: an online softmax over tiles of keys, for every head of a block of queries.

#include "tiles.h"

namespace rk {
namespace RK_SIMD {
namespace {

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

template <typename T>
struct ForwardScratch {
  BiasTile<T> bias;
  QueryRows<T> query;   // [H, BLOCK_N, D] scale q
  QueryRows<T> output;  // [H, BLOCK_N, D] sum_j exp(S_hij - max) v_hj
  T* logits;            // [BLOCK_M, BLOCK_N]
  T* row_max;           // [H, BLOCK_N]
  T* row_sum;           // [H, BLOCK_N] sum_j exp(S_hij - max)
  T* correction;        // [BLOCK_N] exp(old max - new max)
  T* key;               // [BLOCK_M, D]
  T* value;             // [BLOCK_M, D]

  ForwardScratch(Blocks& blocks, const RoutedAttention& a)
      : bias(blocks, a), query(blocks, a.heads, a.channels, true), output(blocks, a.heads, a.channels, false),
        logits(blocks.take<T>(TILE_SIZE)), row_max(blocks.take<T>(a.heads * BLOCK_N)),
        row_sum(blocks.take<T>(a.heads * BLOCK_N)), correction(blocks.take<T>(BLOCK_N)),
        key(blocks.take<T>(BLOCK_M * query.padded_columns)), value(blocks.take<T>(BLOCK_M * query.padded_columns)) {}
};

template <typename T>
struct Forward {
  const RoutedAttention& a;
  int64_t scratch_bytes;

  explicit Forward(const RoutedAttention& args) : a(args) {
    Blocks counting(nullptr);
    ForwardScratch<T>(counting, a);
    scratch_bytes = counting.used + ALIGNMENT;
  }

  int64_t workspace_bytes() const { return a.parallel.workers * scratch_bytes; }

  void attend(int64_t worker) const {
    Blocks own(a.workspace + worker * scratch_bytes);
    ForwardScratch<T> s(own, a);
    for_blocks_of(a, worker, [&](int64_t b, int64_t first, int64_t rows) {
      attend_block(s, {b, first, rows, round_up_to_lanes<T>(rows)});
    });
  }

  void attend_block(ForwardScratch<T>& s, const Place& block) const {
    s.query.read(a.query, start_of(a.query, block), a.query.stride[1], a.query.stride[2], block.rows, T(a.scale));
    s.bias.read_queries(a, block);
    s.output.clear();
    for (int64_t i = 0; i < a.heads * BLOCK_N; ++i) s.row_max[i] = NOT_VISIBLE<T>, s.row_sum[i] = 0;
    for_tiles_of<T>(a, block, [&](const Place& at) {
      s.bias.compute(a, at, false);
      for (int64_t h = 0; h < a.heads; ++h) attend_tile(s, at, h);
    });
    finish(s, block);
  }

  void attend_tile(ForwardScratch<T>& s, const Place& at, int64_t h) const {
    const int64_t padded = s.query.padded_columns;
    const KeyRows<T> key =
        key_rows<T>(a.key, start_of_head(a.key, at, h), a.key.stride[2], a.channels, at, s.key, false);
    const KeyRows<T> value =
        key_rows<T>(a.value, start_of_head(a.value, at, h), a.value.stride[2], a.channels, at, s.value, true);
    gemm<T, false>(
        at.count, at.columns, a.channels, key.data, key.stride, 1, s.query.flipped_of_head(h), BLOCK_N, s.logits,
        BLOCK_N);
    const T* bias = s.bias.of_head(a, at, h);
    const auto softmax = bias == nullptr ? softmax_of_tile<false, false>
        : s.bias.masked                  ? softmax_of_tile<true, true>
                                         : softmax_of_tile<true, false>;
    softmax(s.logits, bias, at, s.row_max + h * BLOCK_N, s.row_sum + h * BLOCK_N, s.correction);
    T* output = s.output.of_head(h);
    for (int64_t i = 0; i < at.rows; ++i) {
      if (s.correction[i] == T(1)) continue;
      for (int64_t d = i * padded; d < (i + 1) * padded; d += LANES<T>)
        store(output + d, load(output + d) * s.correction[i]);
    }
    gemm<T, true>(at.rows, padded, at.count, s.logits, 1, BLOCK_N, value.data, value.stride, output, padded);
  }

  // Online softmax over the keys of a tile, 16 queries at a time: logits become exp(S - max).
  template <bool BIASED, bool MASKED>
  static void softmax_of_tile(T* logits, const T* bias, const Place& at, T* row_max, T* row_sum, T* correction) {
    constexpr int64_t CHAINS = 4;  // independent maxima and sums, against the latency of one
    for (int64_t i = 0; i < at.columns; i += LANES<T>) {
      T* column = logits + i;
      Vec<T> largest[CHAINS], sum[CHAINS] = {};
      for (int64_t c = 0; c < CHAINS; ++c) largest[c] = broadcast(NOT_VISIBLE<T>);
      const auto look_at = [&](int64_t j, int64_t chain) {
        Vec<T> logit = load(column + j * BLOCK_N);
        if constexpr (BIASED) {
          logit = add_bias<T, MASKED>(logit, load(bias + i + j * BLOCK_N));
          store(column + j * BLOCK_N, logit);
        }
        largest[chain] = max<T>(logit, largest[chain]);
      };
      int64_t j = 0;
      for (; j + CHAINS <= at.count; j += CHAINS)
        for (int64_t c = 0; c < CHAINS; ++c) look_at(j + c, c);
      for (; j < at.count; ++j) look_at(j, 0);

      const Vec<T> before = load(row_max + i);
      const Vec<T> in_tile = max<T>(max<T>(largest[0], largest[1]), max<T>(largest[2], largest[3]));
      const Vec<T> now = max<T>(in_tile, before);
      const Vec<T> shift = now == NOT_VISIBLE<T> ? Vec<T>{} : now;
      const Vec<T> factor = before == now ? broadcast(T(1)) : exp_nonpositive(before - shift);

      const auto exponentiate = [&](int64_t k, int64_t chain) {
        const Vec<T> weight = exp_nonpositive(load(column + k * BLOCK_N) - shift);
        store(column + k * BLOCK_N, weight);
        sum[chain] += weight;
      };
      for (j = 0; j + CHAINS <= at.count; j += CHAINS)
        for (int64_t c = 0; c < CHAINS; ++c) exponentiate(j + c, c);
      for (; j < at.count; ++j) exponentiate(j, 0);
      store(row_max + i, now);
      store(row_sum + i, load(row_sum + i) * factor + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
      store(correction + i, factor);
    }
  }

  // O = output / sum, lse = max + log(sum); a query that attended nothing gives 0 and lse = +inf, so that
  // exp(S - lse) is 0 in backward.
  void finish(const ForwardScratch<T>& s, const Place& block) const {
    T* lse = static_cast<T*>(a.lse.data) + start_of(a.lse, block);
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < block.rows; ++i) {
        const T sum = s.row_sum[h * BLOCK_N + i];
        lse[h * a.lse.stride[1] + i * a.lse.stride[2]] =
            sum == 0 ? -NOT_VISIBLE<T> : s.row_max[h * BLOCK_N + i] + log_of(sum);
        write_row<T>(
            s.output.of_head(h) + i * s.output.padded_columns, a.channels, a.output.dtype, a.output.data,
            start_of(a.output, block) + h * a.output.stride[1] + i * a.output.stride[2], sum == 0 ? T(0) : 1 / sum);
      }
  }

  void run() const { on_workers<Forward, &Forward::attend>(a.parallel, *this); }
};

}  // namespace
}  // namespace RK_SIMD
}  // namespace rk
