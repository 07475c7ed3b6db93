#pragma once
// The backward pass: probabilities recomputed from lse, gradients of keys summed in slots.
//
// The queries of an image are cut into parts. A part's gradients of keys are summed in a slot from zero, and the slots
// are added in the order of the parts, whoever has summed them.

#include "forward.h"

namespace rk::routed_attention::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

// Gradients of one image's keys, summed over some of its queries.
template <typename T>
struct KeyGradients {
  T* key;    // [H, M, padded D]
  T* value;  // [H, M, padded D]
  T* sup;    // [M, padded R]
  T* del;    // [M, padded R]
  T* gate;   // [M, padded G]
  int64_t bytes;

  KeyGradients(Blocks& blocks, const Args& a) {
    const int64_t before = blocks.used, padded = round_up_to_lanes<T>(a.channels);
    key = blocks.take<T>(a.heads * a.keys * padded), value = blocks.take<T>(a.heads * a.keys * padded);
    sup = blocks.take<T>(a.keys * round_up_to_lanes<T>(a.sup_rank));
    del = blocks.take<T>(a.keys * round_up_to_lanes<T>(a.del_rank));
    gate = blocks.take<T>(a.keys * round_up_to_lanes<T>(a.gate_rank));
    bytes = blocks.used - before;
  }
};

template <typename T>
struct BackwardScratch {
  BiasTile<T> bias;
  QueryRows<T> query;        // [H, BLOCK_N, D] scale log2(e) q
  QueryRows<T> grad_output;  // [H, BLOCK_N, D]
  QueryRows<T> grad_query;   // [H, BLOCK_N, D] sum_j dS_hij k_hj
  T* grad_sup_q;             // [R, BLOCK_N]
  T* grad_del_q;             // [R, BLOCK_N]
  T* grad_gate_q;            // [G, BLOCK_N]
  T* grad_strength;          // [BLOCK_N] sum_j grad_bias_ij clamp(r_ij)
  T* minus_lse;              // [H, BLOCK_N] times log2(e), as logits are
  T* minus_dot;              // [H, BLOCK_N] -T_hi = -dO_hi . O_hi
  OnlineSoftmax<T> softmax;  // of rows whose lse could not carry the sum
  T* pairs;                  // [BLOCK_M, BLOCK_N] P, then dS in its place: the weights of `softmax`
  T* grad_bias;              // [BLOCK_M, BLOCK_N] sum_h dS
  T* key;                    // [BLOCK_M, D]
  T* value;                  // [BLOCK_M, D]
  T* sum;                    // [BLOCK_M, widest of D, R, G]

  BackwardScratch(Blocks& blocks, const Args& a)
      : bias(blocks, a), query(blocks, a.heads, a.channels, true), grad_output(blocks, a.heads, a.channels, true),
        grad_query(blocks, a.heads, a.channels, false), grad_sup_q(blocks.take<T>(a.sup_rank * BLOCK_N)),
        grad_del_q(blocks.take<T>(a.del_rank * BLOCK_N)), grad_gate_q(blocks.take<T>(a.gate_rank * BLOCK_N)),
        grad_strength(blocks.take<T>(BLOCK_N)), minus_lse(blocks.take<T>(a.heads * BLOCK_N)),
        minus_dot(blocks.take<T>(a.heads * BLOCK_N)), softmax(blocks, a.heads), pairs(softmax.weights),
        grad_bias(blocks.take<T>(TILE_SIZE)), key(blocks.take<T>(BLOCK_M * query.padded_columns)),
        value(blocks.take<T>(BLOCK_M * query.padded_columns)),
        sum(blocks.take<T>(
            BLOCK_M *
            larger(
                larger(query.padded_columns, bias.sup.queries.padded_columns),
                larger(bias.del.queries.padded_columns, bias.gate.queries.padded_columns)))) {}
};

template <typename T>
struct Backward {
  const Args& a;
  const Gradients& grad = a.grad;
  int64_t parts;            // of an image
  int64_t sharers;          // workers that have parts
  int64_t spare_slots = 0;  // of each of them
  int64_t slot_bytes, scratch_bytes;

  explicit Backward(const Args& args) : a(args) {
    const int64_t blocks = (a.queries + BLOCK_N - 1) / BLOCK_N;
    parts = a.batch < 16 ? smaller(larger(blocks, 1), 4) : 1;
    if (a.batch < 16 && parts < 4 && a.batch * parts % 2 != 0) ++parts;  // for two threads: the same work
    sharers = smaller(a.parallel.workers, larger(a.batch * parts, 1));
    bool adds = false;
    for (int64_t worker = 0; worker < sharers; ++worker)
      for_groups(a.batch, parts, worker, sharers, [&](int64_t, const Share& mine) {
        adds = adds || (mine.begin == 0 && mine.end > 1);
        if (mine.begin > 0) spare_slots = larger(spare_slots, mine.end - mine.begin - 1);
      });
    if (adds) spare_slots = a.batch == 1 ? larger(spare_slots, 1) : spare_slots + 1;
    Blocks counting_slot(nullptr), counting_scratch(nullptr);
    slot_bytes = KeyGradients<T>(counting_slot, a).bytes + ALIGNMENT;
    BackwardScratch<T>(counting_scratch, a);
    scratch_bytes = counting_scratch.used + ALIGNMENT;
  }

  // A worker that begins within an image keeps each of its parts; others add them to the first one. All but the first
  // are in slots beside the (worker, image) pairs'.
  int64_t slots() const { return sharers + a.batch - 1 + sharers * spare_slots; }
  int64_t workspace_bytes() const { return slots() * slot_bytes + a.parallel.workers * scratch_bytes; }

  KeyGradients<T> slot(int64_t index) const {
    Blocks own(a.workspace + index * slot_bytes);
    return KeyGradients<T>(own, a);
  }

  // Walking through (image, worker) pairs in order, each step raises one of them: the sum numbers the slots.
  KeyGradients<T> first_slot_of(int64_t worker, int64_t b) const { return slot(worker + b); }

  KeyGradients<T> spare_slot_of(int64_t worker, int64_t index) const {
    return slot(sharers + a.batch - 1 + worker * spare_slots + index);
  }

  BackwardScratch<T> scratch_of(int64_t worker) const {
    Blocks own(a.workspace + slots() * slot_bytes + worker * scratch_bytes);
    return BackwardScratch<T>(own, a);
  }

  void differentiate(int64_t worker) const {
    BackwardScratch<T> s = scratch_of(worker);
    for_groups(a.batch, parts, worker, sharers, [&](int64_t b, const Share& mine) {
      const KeyGradients<T> first = first_slot_of(worker, b);
      differentiate_part(s, first, b, mine.begin);
      for (int64_t part = mine.begin + 1; part < mine.end; ++part) {
        const KeyGradients<T> next = spare_slot_of(worker, mine.begin == 0 ? spare_slots - 1 : part - mine.begin - 1);
        differentiate_part(s, next, b, part);
        if (mine.begin == 0) add(first.key, next.key, first.bytes / int64_t(sizeof(T)));
      }
    });
  }

  void differentiate_part(BackwardScratch<T>& s, const KeyGradients<T>& keys, int64_t b, int64_t part) const {
    memset(keys.key, 0, size_t(keys.bytes));
    for_blocks(a, part, parts, [&](int64_t first, int64_t rows) {
      differentiate_block(s, keys, {b, first, rows, round_up_to_lanes<T>(rows)});
    });
  }

  // sum += part, of so many values: whole vectors
  static void add(T* sum, const T* part, int64_t count) {
    for (int64_t e = 0; e < count; e += LANES<T>) store(sum + e, load(sum + e) + load(part + e));
  }

  void read_block(BackwardScratch<T>& s, const Place& at) const {
    s.query.read(a.query, start_of(a.query, at), a.query.stride[1], a.query.stride[2], at.rows, T(a.scale * LOG2_E));
    // O passes through grad_query's block, which is not needed yet.
    s.grad_query.read(a.output, start_of(a.output, at), a.output.stride[1], a.output.stride[2], at.rows, T(1));
    const View& incoming = grad.output;
    s.grad_output.read(incoming, start_of(incoming, at), incoming.stride[1], incoming.stride[2], at.rows, T(1));
    const int64_t padded = s.query.padded_columns;
    const T* lse = static_cast<const T*>(a.lse.data) + start_of(a.lse, at);
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < BLOCK_N; ++i) {
        Vec<T> dot = {};
        if (i < at.rows)
          for (int64_t d = i * padded; d < (i + 1) * padded; d += LANES<T>)
            dot += load(s.grad_output.of_head(h) + d) * load(s.grad_query.of_head(h) + d);
        s.minus_dot[h * BLOCK_N + i] = -sum_of_lanes<T>(dot);
        s.minus_lse[h * BLOCK_N + i] =
            i < at.rows ? -T(LOG2_E) * lse[h * a.lse.stride[1] + i * a.lse.stride[2]] : NOT_VISIBLE<T>;
      }
    s.bias.read_queries(a, at);
    if (a.attn_mask.data != nullptr) recompute_far_rows(s, at);
    s.grad_query.clear();
    if (!a.routed) return;
    memset(s.grad_sup_q, 0, size_t(a.sup_rank * BLOCK_N) * sizeof(T));
    memset(s.grad_del_q, 0, size_t(a.del_rank * BLOCK_N) * sizeof(T));
    memset(s.grad_gate_q, 0, size_t(a.gate_rank * BLOCK_N) * sizeof(T));
    memset(s.grad_strength, 0, BLOCK_N * sizeof(T));
  }

  // P = 2^(S - max) / sum where lse lost the sum: max takes the place of lse, and 1 / sum goes into dO and T.
  void recompute_far_rows(BackwardScratch<T>& s, const Place& block) const {
    const auto is_far = [&](int64_t row) {
      return s.minus_lse[row] > T(-FAR_BELOW) && s.minus_lse[row] < -NOT_VISIBLE<T>;
    };
    bool found = false;
    for (int64_t row = 0; row < a.heads * BLOCK_N; ++row) found = found || is_far(row);
    if (!found) return;
    s.softmax.start();
    for_tiles_of<T>(a, block, [&](const Place& at) {
      s.bias.compute(a, at, false);
      for (int64_t h = 0; h < a.heads; ++h) {
        const Matrix<T> key =
            key_rows<T>(a.key, start_of_head(a.key, at, h), a.key.stride[2], a.channels, at, s.key, true);
        s.softmax.add(s.query, s.bias, at, h, key, s.bias.of_head(a, at, h));
      }
    });
    const int64_t padded = s.grad_output.padded_columns;
    for (int64_t row = 0; row < a.heads * BLOCK_N; ++row) {
      if (!is_far(row)) continue;
      const int64_t h = row / BLOCK_N, i = row % BLOCK_N;
      const T factor = 1 / s.softmax.sums[row];
      s.minus_lse[row] = -s.softmax.maxima[row];
      s.minus_dot[row] *= factor;
      for (int64_t d = 0; d < a.channels; ++d) {
        s.grad_output.of_head(h)[i * padded + d] *= factor;
        s.grad_output.flipped_of_head(h)[d * BLOCK_N + i] *= factor;
      }
    }
  }

  void differentiate_block(BackwardScratch<T>& s, const KeyGradients<T>& keys, const Place& block) const {
    read_block(s, block);
    for_tiles_of<T>(a, block, [&](const Place& at) {
      s.bias.compute(a, at, true);
      for (int64_t h = 0; h < a.heads; ++h) differentiate_tile(s, keys, at, h);
      if (a.routed && a.heads > 0) differentiate_routes(s, keys, at);
    });
    write_block(s, block);
  }

  void differentiate_tile(BackwardScratch<T>& s, const KeyGradients<T>& keys, const Place& at, int64_t h) const {
    const int64_t padded = s.query.padded_columns;
    const Matrix<T> key = key_rows<T>(a.key, start_of_head(a.key, at, h), a.key.stride[2], a.channels, at, s.key, true);
    const Matrix<T> value =
        key_rows<T>(a.value, start_of_head(a.value, at, h), a.value.stride[2], a.channels, at, s.value, false);
    const T* bias = s.bias.of_head(a, at, h);
    const auto recompute = bias == nullptr ? probabilities_of_tile<false, false>
        : s.bias.masked                    ? probabilities_of_tile<true, true>
                                           : probabilities_of_tile<true, false>;
    const int64_t key_row = (h * a.keys + at.key) * padded;
    recompute(s, at, h, key, bias);
    multiply_add<T>(
        at.count, padded, at.rows, {s.pairs, BLOCK_N}, {s.grad_output.of_head(h), padded}, keys.value + key_row,
        padded);
    const auto softmax_adjoint = !a.routed ? softmax_adjoint_of_tile<false, false>
        : h == 0                           ? softmax_adjoint_of_tile<true, false>
                                           : softmax_adjoint_of_tile<true, true>;
    softmax_adjoint(s, at, h, value);
    multiply_add<T>(
        at.count, padded, at.rows, {s.pairs, BLOCK_N}, {s.query.of_head(h), padded}, keys.key + key_row, padded);
    multiply_add<T>(at.rows, padded, at.count, {s.pairs, 1, BLOCK_N}, key, s.grad_query.of_head(h), padded);
  }

  // P = 2^(S + bias - lse)
  template <bool BIASED, bool MASKED>
  static void probabilities_of_tile(
      const BackwardScratch<T>& s, const Place& at, int64_t h, const Matrix<T>& key, const T* bias) {
    const T* minus_lse = s.minus_lse + h * BLOCK_N;
    gemm<T>(
        at.count, at.columns, s.query.columns, key, {s.query.flipped_of_head(h), BLOCK_N},
        [&](int64_t j, int64_t i) RK_INLINE {
          if constexpr (MASKED) return Vec<T>{};
          return BIASED ? load(bias + j * BLOCK_N + i) + load(minus_lse + i) : load(minus_lse + i);
        },
        [&](int64_t j, int64_t i, Vec<T> log_probability) RK_INLINE {
          const int64_t e = j * BLOCK_N + i;
          if constexpr (MASKED)
            log_probability = masked_logit<T>(log_probability, load(bias + e)) + load(minus_lse + i);
          store(s.pairs + e, exp2_nonpositive(log_probability));
        });
  }

  // dS = P (dP - T) in P's place,  dbias = dS, or += where there are ones of other heads
  template <bool ROUTED, bool ADDED>
  static void softmax_adjoint_of_tile(const BackwardScratch<T>& s, const Place& at, int64_t h, const Matrix<T>& value) {
    const T* minus_dot = s.minus_dot + h * BLOCK_N;
    gemm<T>(
        at.count, at.columns, s.query.columns, value, {s.grad_output.flipped_of_head(h), BLOCK_N},
        [&](int64_t, int64_t i) RK_INLINE { return load(minus_dot + i); },
        [&](int64_t j, int64_t i, Vec<T> grad_probability_minus_dot) RK_INLINE {
          const int64_t e = j * BLOCK_N + i;
          const Vec<T> grad_logit = load(s.pairs + e) * grad_probability_minus_dot;
          store(s.pairs + e, grad_logit);
          if constexpr (ROUTED) store(s.grad_bias + e, ADDED ? load(s.grad_bias + e) + grad_logit : grad_logit);
        });
  }

  void differentiate_routes(BackwardScratch<T>& s, const KeyGradients<T>& keys, const Place& at) const {
    const Vec<T> limit = broadcast(T(a.limit)), strength = broadcast(T(a.strength));
    const bool of_strength = grad.strength.data != nullptr;
    BiasTile<T>& tile = s.bias;
    for (int64_t j = 0; j < at.count; ++j)
      for (int64_t e = j * BLOCK_N; e < j * BLOCK_N + at.columns; e += LANES<T>) {
        const Vec<T> r = load(tile.del.products + e), grad_bias = load(s.grad_bias + e);
        if (of_strength) add_strength_gradient(s.grad_strength + (e - j * BLOCK_N), clamp(r, limit), grad_bias);
        const Vec<T> grad_r = strength * clamp_adjoint(r, limit, grad_bias);
        const RouteGradient<Vec<T>> g =
            route_adjoint(load(tile.gate.products + e), load(tile.sup.products + e), grad_r);
        store(tile.sup.products + e, g.sup), store(tile.del.products + e, g.del);
        store(tile.gate.products + e, g.gate);
      }
    add_factor_gradients(tile.sup, s.grad_sup_q, keys.sup, at);
    add_factor_gradients(tile.del, s.grad_del_q, keys.del, at);
    add_factor_gradients(tile.gate, s.grad_gate_q, keys.gate, at);
  }

  // grad_i += grad_bias_ij clamp(r_ij), of pairs that have a gradient: r of others may be NaN
  static void add_strength_gradient(T* grad, Vec<T> clamped, Vec<T> grad_bias) {
    store(grad, load(grad) + (grad_bias == 0 ? grad_bias : grad_bias * clamped));
  }

  // grad_q^T += keys^T dproducts,  grad_k += dproducts queries
  static void add_factor_gradients(const FactorTile<T>& factor, T* flipped_grad_q, T* grad_k, const Place& at) {
    const QueryRows<T>& queries = factor.queries;
    const int64_t padded = queries.padded_columns;
    multiply_add<T>(
        queries.columns, at.columns, at.count, transposed(factor.keys), {factor.products, BLOCK_N}, flipped_grad_q,
        BLOCK_N);
    multiply_add<T>(
        at.count, padded, at.rows, {factor.products, BLOCK_N}, {queries.rows, padded}, grad_k + at.key * padded,
        padded);
  }

  void write_block(const BackwardScratch<T>& s, const Place& at) const {
    const View& q = grad.query;
    s.grad_query.write(q, start_of(q, at), q.stride[1], q.stride[2], at.rows, T(a.scale));
    if (!a.routed) return;
    const auto write = [&](const FactorTile<T>& factor, const T* flipped, const View& to) {
      const QueryRows<T>& rows = factor.queries;  // their content is not needed any more
      transpose(flipped, BLOCK_N, rows.columns, at.rows, rows.rows, rows.padded_columns);
      rows.write(to, at.b * to.stride[0] + at.first * to.stride[1], 0, to.stride[1], at.rows, T(1));
    };
    write(s.bias.sup, s.grad_sup_q, grad.sup_q), write(s.bias.del, s.grad_del_q, grad.del_q);
    write(s.bias.gate, s.grad_gate_q, grad.gate_q);
    if (grad.strength.data == nullptr) return;
    T* of_strength = static_cast<T*>(grad.strength.data) + at.b * a.queries + at.first;
    memcpy(of_strength, s.grad_strength, size_t(at.rows) * sizeof(T));
  }

  // grad = factor * (sum of the slots of image b, in the order of the parts)
  void write_key_gradient(
      const View& to, int64_t b, int64_t h, int64_t head_stride, int64_t row_stride, int64_t columns,
      T* KeyGradients<T>::* member, int64_t first, T* sum, T factor) const {
    const int64_t padded = round_up_to_lanes<T>(columns), count = smaller(BLOCK_M, a.keys - first);
    const int64_t offset = (h * a.keys + first) * padded;
    memset(sum, 0, size_t(count * padded) * sizeof(T));
    for (int64_t worker = 0; worker < sharers; ++worker) {
      const Share mine = parts_of_group(b, a.batch, parts, worker, sharers);
      if (mine.begin == mine.end) continue;
      add(sum, first_slot_of(worker, b).*member + offset, count * padded);
      for (int64_t kept = 1; mine.begin > 0 && kept < mine.end - mine.begin; ++kept)
        add(sum, spare_slot_of(worker, kept - 1).*member + offset, count * padded);
    }
    for (int64_t j = 0; j < count; ++j)
      write_row<T>(
          sum + j * padded, columns, to.dtype, to.data, b * to.stride[0] + h * head_stride + (first + j) * row_stride,
          factor);
  }

  void write_keys(int64_t worker) const {
    T* sum = scratch_of(worker).sum;
    const int64_t tiles = (a.keys + BLOCK_M - 1) / BLOCK_M;
    const int64_t parts = a.heads + (a.routed ? 1 : 0);  // of an image: its heads, then the factors
    const Share share = share_of(a.batch * parts * tiles, worker, a.parallel.workers);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t b = item / tiles / parts, part = item / tiles % parts, first = item % tiles * BLOCK_M;
      using Slot = KeyGradients<T>;
      const auto write = [&](const View& to, int64_t h, int64_t head_stride, int64_t row_stride, int64_t columns,
                             auto member, T factor = 1) {
        write_key_gradient(to, b, h, head_stride, row_stride, columns, member, first, sum, factor);
      };
      if (part < a.heads) {
        write(grad.key, part, grad.key.stride[1], grad.key.stride[2], a.channels, &Slot::key, T(LN_2));
        write(grad.value, part, grad.value.stride[1], grad.value.stride[2], a.channels, &Slot::value);
      } else {
        write(grad.sup_k, 0, 0, grad.sup_k.stride[1], a.sup_rank, &Slot::sup);
        write(grad.del_k, 0, 0, grad.del_k.stride[1], a.del_rank, &Slot::del);
        write(grad.gate_k, 0, 0, grad.gate_k.stride[1], a.gate_rank, &Slot::gate);
      }
    }
  }

  void run() const {
    Parallel{sharers, a.parallel.run}.each([this](int64_t worker) { differentiate(worker); });
    a.parallel.each([this](int64_t worker) { write_keys(worker); });
  }
};

}  // namespace
}  // namespace rk::routed_attention::RK_SIMD
