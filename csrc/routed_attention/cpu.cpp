// Routed attention on a CPU. A worker takes a block of 64 queries with all its heads: the bias tile of 64 x 128 pairs is
// computed once and added for every head, so its cost is divided by H. Forward is an online softmax; backward recomputes
// the probabilities from lse. Workers add the gradients of keys into slots of their own, summed in a fixed order.

#include "tiles.h"

namespace rk {
namespace RK_SIMD {
namespace {

template <typename T>
inline T exp_of(T x) {
  return exp_nonpositive(broadcast(x))[0];
}

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// Runs `method(worker)` of an object on every worker.
template <typename Object, void (Object::*METHOD)(int64_t) const>
void on_workers(const Parallel& parallel, const Object& object) {
  parallel.run(
      parallel.workers,
      [](int64_t worker, void* context) { (static_cast<const Object*>(context)->*METHOD)(worker); },
      const_cast<Object*>(&object));
}

template <typename T>
struct ForwardScratch {
  BiasTile<T> bias;
  QueryRows<T> query;   // [H, BLOCK_N, D] scale q
  QueryRows<T> output;  // [H, BLOCK_N, D] sum_j exp(S_hij - max) v_hj
  T* logits;            // [BLOCK_N, TILE_ROW]
  T* row_max;           // [H, BLOCK_N]
  T* row_sum;           // [H, BLOCK_N] sum_j exp(S_hij - max)
  T* packing;           // [BLOCK_M, widest of D, R, G]

  ForwardScratch(Blocks& blocks, const RoutedAttention& a)
      : bias(blocks, a), query(blocks, a.heads, a.channels), output(blocks, a.heads, a.channels),
        logits(blocks.take<T>(TILE_SIZE<T>)), row_max(blocks.take<T>(a.heads * BLOCK_N)),
        row_sum(blocks.take<T>(a.heads * BLOCK_N)), packing(blocks.take<T>(BLOCK_M * widest_row<T>(a))) {}
};

template <typename T>
struct Forward {
  const RoutedAttention& a;
  Blocks blocks;
  PackedInputs<T> packed;
  char* scratch_base;
  int64_t scratch_bytes, workspace_bytes;

  explicit Forward(const RoutedAttention& args)
      : a(args), blocks(args.workspace), packed(blocks, args, false), scratch_base(args.workspace) {
    Blocks counting(nullptr);
    ForwardScratch<T>(counting, a);
    scratch_bytes = counting.used + ALIGNMENT;
    if (scratch_base != nullptr) scratch_base += blocks.used;
    workspace_bytes = blocks.used + a.parallel.workers * scratch_bytes + ALIGNMENT;
  }

  ForwardScratch<T> scratch_of(int64_t worker) const {
    Blocks own(scratch_base + worker * scratch_bytes);
    return ForwardScratch<T>(own, a);
  }

  void pack(int64_t worker) const { packed.pack(a, scratch_of(worker).packing, worker); }

  void attend(int64_t worker) const {
    ForwardScratch<T> s = scratch_of(worker);
    for_blocks_of(a, worker, [&](int64_t b, int64_t first, int64_t rows) { attend_block(s, b, first, rows); });
  }

  void attend_block(ForwardScratch<T>& s, int64_t b, int64_t first, int64_t rows) const {
    s.query.read(
        a.query, b * a.query.stride[0] + first * a.query.stride[2], a.query.stride[1], a.query.stride[2], rows,
        T(a.scale));
    s.bias.read_queries(a, b, first, rows);
    s.output.clear();
    for (int64_t i = 0; i < a.heads * BLOCK_N; ++i) s.row_max[i] = NOT_VISIBLE<T>, s.row_sum[i] = 0;
    for (int64_t key = 0; key < a.keys; key += BLOCK_M) {
      if (!BiasTile<T>::sees(a, b, first, rows, key)) continue;
      s.bias.compute(a, packed.factors, b, first, rows, key);
      for (int64_t h = 0; h < a.heads; ++h) attend_tile(s, b, h, first, rows, key);
    }
    finish(s, b, first, rows);
  }

  void attend_tile(ForwardScratch<T>& s, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t key) const {
    const int64_t slice = b * a.heads + h, columns = s.bias.columns;
    const int64_t padded = s.query.padded_columns;
    const T* bias = s.bias.of_head(a, b, h, first, rows, key);
    gemm<T, false>(
        rows, columns, a.channels, s.query.of_head(h), padded, 1, packed.key.flipped_at(slice, key),
        TILE_ROW<T>, s.logits, TILE_ROW<T>);
    for (int64_t i = 0; i < rows; ++i) {
      T* row = s.logits + i * TILE_ROW<T>;
      const T* bias_row = bias == nullptr ? nullptr : bias + i * TILE_ROW<T>;
      const T in_tile = s.bias.masked ? add_row<true>(row, bias_row, columns) : add_row<false>(row, bias_row, columns);
      T& row_max = s.row_max[h * BLOCK_N + i];
      T& row_sum = s.row_sum[h * BLOCK_N + i];
      const T before = row_max;
      row_max = in_tile > before ? in_tile : before;
      const T shift = row_max == NOT_VISIBLE<T> ? T(0) : row_max;
      Vec<T> sum = {};
      for (int64_t j = 0; j < columns; j += LANES<T>) {
        const Vec<T> weight = exp_nonpositive(load(row + j) - shift);
        store(row + j, weight);
        sum += weight;
      }
      const T correction = before == row_max ? T(1) : exp_of<T>(before - shift);
      row_sum = row_sum * correction + sum_of_lanes<T>(sum);
      if (correction != T(1)) {
        T* output = s.output.of_head(h) + i * padded;
        for (int64_t d = 0; d < padded; d += LANES<T>) store(output + d, load(output + d) * correction);
      }
    }
    gemm<T, true>(
        rows, padded, smaller(BLOCK_M, a.keys - key), s.logits, TILE_ROW<T>, 1, packed.value.rows_at(slice, key), padded,
        s.output.of_head(h), padded);
  }

  // row += bias; the largest entry.
  template <bool MASKED>
  static T add_row(T* row, const T* bias, int64_t columns) {
    Vec<T> largest = broadcast(NOT_VISIBLE<T>);
    if (bias == nullptr) {
      for (int64_t j = 0; j < columns; j += LANES<T>) largest = max<T>(load(row + j), largest);
    } else {
      for (int64_t j = 0; j < columns; j += LANES<T>) {
        const Vec<T> logits = add_bias<T, MASKED>(load(row + j), load(bias + j));
        store(row + j, logits);
        largest = max<T>(logits, largest);
      }
    }
    return max_of_lanes<T>(largest);
  }

  // O = output / sum, lse = max + log(sum); a query that attended nothing gives 0 and lse = +inf, so that
  // exp(S - lse) is 0 in backward.
  void finish(const ForwardScratch<T>& s, int64_t b, int64_t first, int64_t rows) const {
    T* lse = static_cast<T*>(a.lse.data) + b * a.lse.stride[0] + first * a.lse.stride[2];
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < rows; ++i) {
        const T sum = s.row_sum[h * BLOCK_N + i];
        lse[h * a.lse.stride[1] + i * a.lse.stride[2]] =
            sum == 0 ? -NOT_VISIBLE<T> : s.row_max[h * BLOCK_N + i] + log_of(sum);
        write_row<T>(
            s.output.of_head(h) + i * s.output.padded_columns, a.channels, a.output.dtype, a.output.data,
            b * a.output.stride[0] + h * a.output.stride[1] + (first + i) * a.output.stride[2],
            sum == 0 ? T(0) : 1 / sum);
      }
  }

  void run() const {
    on_workers<Forward, &Forward::pack>(a.parallel, *this);
    on_workers<Forward, &Forward::attend>(a.parallel, *this);
  }
};

// Gradients of one image's keys, as one worker has summed them.
template <typename T>
struct KeyGradients {
  T* key;    // [H, M, padded D]
  T* value;  // [H, M, padded D]
  T* sup;    // [M, padded R]
  T* del;    // [M, padded R]
  T* gate;   // [M, padded G]
  int64_t bytes;

  KeyGradients(Blocks& blocks, const RoutedAttention& a) {
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
  QueryRows<T> query;                                // [H, BLOCK_N, D] scale q
  QueryRows<T> grad_output;                          // [H, BLOCK_N, D]
  QueryRows<T> grad_query;                           // [H, BLOCK_N, D] sum_j dS_hij k_hj
  QueryRows<T> grad_sup_q, grad_del_q, grad_gate_q;  // [BLOCK_N, R], [BLOCK_N, R], [BLOCK_N, G]
  T* lse;           // [H, BLOCK_N]
  T* dot;           // [H, BLOCK_N] T_hi = dO_hi . O_hi
  T* probability;   // [BLOCK_N, TILE_ROW] P
  T* grad_logits;   // [BLOCK_N, TILE_ROW] dS
  T* grad_bias;     // [BLOCK_N, TILE_ROW] sum_h dS
  T* packing;       // [BLOCK_M, widest of D, R, G]

  BackwardScratch(Blocks& blocks, const RoutedAttention& a)
      : bias(blocks, a), query(blocks, a.heads, a.channels), grad_output(blocks, a.heads, a.channels),
        grad_query(blocks, a.heads, a.channels), grad_sup_q(blocks, 1, a.sup_rank), grad_del_q(blocks, 1, a.del_rank),
        grad_gate_q(blocks, 1, a.gate_rank), lse(blocks.take<T>(a.heads * BLOCK_N)),
        dot(blocks.take<T>(a.heads * BLOCK_N)), probability(blocks.take<T>(TILE_SIZE<T>)),
        grad_logits(blocks.take<T>(TILE_SIZE<T>)), grad_bias(blocks.take<T>(TILE_SIZE<T>)),
        packing(blocks.take<T>(BLOCK_M * widest_row<T>(a))) {}
};

template <typename T>
struct Backward {
  const RoutedAttention& a;
  const RoutedAttentionGradients& grad;
  Blocks blocks;
  PackedInputs<T> packed;
  char* slots_base;
  char* scratch_base;
  int64_t slot_bytes, scratch_bytes, workspace_bytes;

  Backward(const RoutedAttention& args, const RoutedAttentionGradients& gradients)
      : a(args), grad(gradients), blocks(args.workspace), packed(blocks, args, true) {
    Blocks counting_slot(nullptr), counting_scratch(nullptr);
    slot_bytes = KeyGradients<T>(counting_slot, a).bytes + ALIGNMENT;
    BackwardScratch<T>(counting_scratch, a);
    scratch_bytes = counting_scratch.used + ALIGNMENT;
    const int64_t slots = a.parallel.workers + a.batch;
    slots_base = a.workspace == nullptr ? nullptr : a.workspace + blocks.used;
    scratch_base = a.workspace == nullptr ? nullptr : slots_base + slots * slot_bytes;
    workspace_bytes = blocks.used + slots * slot_bytes + a.parallel.workers * scratch_bytes + ALIGNMENT;
  }

  // Walking through (image, worker) pairs in order, each step raises one of them: the sum numbers the slots.
  KeyGradients<T> slot_of(int64_t worker, int64_t b) const {
    Blocks own(slots_base + (worker + b) * slot_bytes);
    return KeyGradients<T>(own, a);
  }

  BackwardScratch<T> scratch_of(int64_t worker) const {
    Blocks own(scratch_base + worker * scratch_bytes);
    return BackwardScratch<T>(own, a);
  }

  void pack(int64_t worker) const { packed.pack(a, scratch_of(worker).packing, worker); }

  void differentiate(int64_t worker) const {
    BackwardScratch<T> s = scratch_of(worker);
    int64_t image = -1;
    for_blocks_of(a, worker, [&](int64_t b, int64_t first, int64_t rows) {
      const KeyGradients<T> keys = slot_of(worker, b);
      if (b != image) memset(keys.key, 0, size_t(keys.bytes));
      image = b;
      differentiate_block(s, keys, b, first, rows);
    });
  }

  void read_block(BackwardScratch<T>& s, int64_t b, int64_t first, int64_t rows) const {
    const auto start = [&](const View& view) { return b * view.stride[0] + first * view.stride[2]; };
    s.query.read(a.query, start(a.query), a.query.stride[1], a.query.stride[2], rows, T(a.scale));
    // O passes through grad_query's block, which is not needed yet.
    s.grad_query.read(a.output, start(a.output), a.output.stride[1], a.output.stride[2], rows, T(1));
    s.grad_output.read(grad.output, start(grad.output), grad.output.stride[1], grad.output.stride[2], rows, T(1));
    const int64_t padded = s.query.padded_columns;
    const T* lse = static_cast<const T*>(a.lse.data) + start(a.lse);
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < rows; ++i) {
        const T* grad_row = s.grad_output.of_head(h) + i * padded;
        const T* output_row = s.grad_query.of_head(h) + i * padded;
        Vec<T> dot = {};
        for (int64_t d = 0; d < padded; d += LANES<T>) dot += load(grad_row + d) * load(output_row + d);
        s.dot[h * BLOCK_N + i] = sum_of_lanes<T>(dot);
        s.lse[h * BLOCK_N + i] = lse[h * a.lse.stride[1] + i * a.lse.stride[2]];
      }
    s.bias.read_queries(a, b, first, rows);
    s.grad_query.clear(), s.grad_sup_q.clear(), s.grad_del_q.clear(), s.grad_gate_q.clear();
  }

  void differentiate_block(
      BackwardScratch<T>& s, const KeyGradients<T>& keys, int64_t b, int64_t first, int64_t rows) const {
    read_block(s, b, first, rows);
    for (int64_t key = 0; key < a.keys; key += BLOCK_M) {
      if (!BiasTile<T>::sees(a, b, first, rows, key)) continue;
      s.bias.compute(a, packed.factors, b, first, rows, key);
      if (a.routed) memset(s.grad_bias, 0, size_t(rows * TILE_ROW<T>) * sizeof(T));
      for (int64_t h = 0; h < a.heads; ++h) differentiate_tile(s, keys, b, h, first, rows, key);
      if (a.routed) differentiate_routes(s, keys, b, rows, key);
    }
    write_block(s, b, first, rows);
  }

  void differentiate_tile(BackwardScratch<T>& s, const KeyGradients<T>& keys, int64_t b, int64_t h, int64_t first,
                          int64_t rows, int64_t key) const {
    const int64_t slice = b * a.heads + h, columns = s.bias.columns, count = smaller(BLOCK_M, a.keys - key);
    const int64_t padded = s.query.padded_columns;
    const T* bias = s.bias.of_head(a, b, h, first, rows, key);
    const T* query = s.query.of_head(h);
    const T* grad_output = s.grad_output.of_head(h);
    gemm<T, false>(
        rows, columns, a.channels, query, padded, 1, packed.key.flipped_at(slice, key), TILE_ROW<T>,
        s.probability, TILE_ROW<T>);
    gemm<T, false>(
        rows, columns, a.channels, grad_output, padded, 1, packed.value.flipped_at(slice, key),
        TILE_ROW<T>, s.grad_logits, TILE_ROW<T>);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = i * TILE_ROW<T>, of_head = h * BLOCK_N + i;
      const auto differentiate = s.bias.masked ? differentiate_row<true> : differentiate_row<false>;
      differentiate(
          s.probability + row, s.grad_logits + row, bias == nullptr ? nullptr : bias + row,
          a.routed ? s.grad_bias + row : nullptr, s.lse[of_head], s.dot[of_head], columns);
    }
    const int64_t key_row = (h * a.keys + key) * padded;
    gemm<T, true>(
        count, padded, rows, s.probability, 1, TILE_ROW<T>, grad_output, padded, keys.value + key_row, padded);
    gemm<T, true>(count, padded, rows, s.grad_logits, 1, TILE_ROW<T>, query, padded, keys.key + key_row, padded);
    gemm<T, true>(
        rows, padded, count, s.grad_logits, TILE_ROW<T>, 1, packed.key.rows_at(slice, key), padded,
        s.grad_query.of_head(h), padded);
  }

  // P = exp(S + bias - lse),  dS = P (dP - T),  dbias += dS; S becomes P and dP becomes dS.
  template <bool MASKED>
  static void differentiate_row(
      T* logits, T* grad, const T* bias, T* grad_bias, T lse_of_row, T dot_of_row, int64_t columns) {
    const Vec<T> lse = broadcast(lse_of_row), dot = broadcast(dot_of_row);
    for (int64_t j = 0; j < columns; j += LANES<T>) {
      const Vec<T> plain = load(logits + j);
      const Vec<T> biased = bias == nullptr ? plain : add_bias<T, MASKED>(plain, load(bias + j));
      const Vec<T> probability = exp_nonpositive(biased - lse);
      const Vec<T> grad_logits = probability * (load(grad + j) - dot);
      store(logits + j, probability);
      store(grad + j, grad_logits);
      if (grad_bias != nullptr) store(grad_bias + j, load(grad_bias + j) + grad_logits);
    }
  }

  void differentiate_routes(
      BackwardScratch<T>& s, const KeyGradients<T>& keys, int64_t b, int64_t rows, int64_t key) const {
    const int64_t count = smaller(BLOCK_M, a.keys - key);
    const Vec<T> limit = broadcast(a.clamped ? T(a.limit) : T(__builtin_inff()));
    BiasTile<T>& tile = s.bias;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t e = i * TILE_ROW<T>; e < i * TILE_ROW<T> + tile.columns; e += LANES<T>) {
        const Vec<T> grad_r = clamp_adjoint(load(tile.del + e), limit, load(s.grad_bias + e));
        const RouteGradient<Vec<T>> g = route_adjoint(load(tile.p + e), load(tile.sup + e), grad_r);
        store(tile.sup + e, g.sup), store(tile.del + e, g.del), store(tile.p + e, g.gate);
      }
    add_factor_gradients(packed.factors.sup, tile.sup, tile.sup_q, s.grad_sup_q, keys.sup, b, rows, key, count);
    add_factor_gradients(packed.factors.del, tile.del, tile.del_q, s.grad_del_q, keys.del, b, rows, key, count);
    add_factor_gradients(packed.factors.gate, tile.p, tile.gate_q, s.grad_gate_q, keys.gate, b, rows, key, count);
  }

  // grad_q += dproduct keys,  grad_k += dproduct^T queries
  static void add_factor_gradients(
      const PackedKeys<T>& keys, const T* grad_product, const QueryRows<T>& queries, const QueryRows<T>& grad_queries,
      T* grad_keys, int64_t b, int64_t rows, int64_t key, int64_t count) {
    const int64_t padded = keys.padded_columns;
    gemm<T, true>(
        rows, padded, count, grad_product, TILE_ROW<T>, 1, keys.rows_at(b, key), padded, grad_queries.data, padded);
    gemm<T, true>(
        count, padded, rows, grad_product, 1, TILE_ROW<T>, queries.data, padded, grad_keys + key * padded, padded);
  }

  void write_block(const BackwardScratch<T>& s, int64_t b, int64_t first, int64_t rows) const {
    const View& q = grad.query;
    s.grad_query.write(q, b * q.stride[0] + first * q.stride[2], q.stride[1], q.stride[2], rows, T(a.scale));
    if (!a.routed) return;
    const QueryRows<T>* factors[] = {&s.grad_sup_q, &s.grad_del_q, &s.grad_gate_q};
    const View* views[] = {&grad.sup_q, &grad.del_q, &grad.gate_q};
    for (int i = 0; i < 3; ++i) {
      const View& view = *views[i];
      factors[i]->write(view, b * view.stride[0] + first * view.stride[1], 0, view.stride[1], rows, T(1));
    }
  }

  // grad = sum of the slots of image b, in the order of the workers, for rows `offset + j * padded` of a slot.
  void write_key_gradient(const View& to, int64_t b, int64_t h, int64_t row_stride, int64_t head_stride, int64_t columns,
                          T* KeyGradients<T>::*member, int64_t first, T* sum) const {
    const int64_t padded = round_up_to_lanes<T>(columns), count = smaller(BLOCK_M, a.keys - first);
    const int64_t offset = (h * a.keys + first) * padded;
    memset(sum, 0, size_t(count * padded) * sizeof(T));
    for (int64_t worker = 0; worker < a.parallel.workers; ++worker) {
      if (!works_on(a, worker, b)) continue;
      const T* part = slot_of(worker, b).*member + offset;
      for (int64_t e = 0; e < count * padded; e += LANES<T>) store(sum + e, load(sum + e) + load(part + e));
    }
    for (int64_t j = 0; j < count; ++j)
      write_row<T>(
          sum + j * padded, columns, to.dtype, to.data,
          b * to.stride[0] + h * head_stride + (first + j) * row_stride, T(1));
  }

  void write_keys(int64_t worker) const {
    T* sum = scratch_of(worker).packing;
    const int64_t tiles = blocks_of(a.keys, BLOCK_M);
    const Share share = share_of(a.batch * a.heads * tiles, worker, a.parallel.workers);
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t slice = item / tiles, first = item % tiles * BLOCK_M, b = slice / a.heads, h = slice % a.heads;
      using Slot = KeyGradients<T>;
      const auto write = [&](const View& to, int64_t row_stride, int64_t head_stride, int64_t columns, auto member) {
        write_key_gradient(to, b, h, row_stride, head_stride, columns, member, first, sum);
      };
      write(grad.key, grad.key.stride[2], grad.key.stride[1], a.channels, &Slot::key);
      write(grad.value, grad.value.stride[2], grad.value.stride[1], a.channels, &Slot::value);
      if (!a.routed || h > 0) continue;
      write(grad.sup_k, grad.sup_k.stride[1], 0, a.sup_rank, &Slot::sup);
      write(grad.del_k, grad.del_k.stride[1], 0, a.del_rank, &Slot::del);
      write(grad.gate_k, grad.gate_k.stride[1], 0, a.gate_rank, &Slot::gate);
    }
  }

  void run() const {
    on_workers<Backward, &Backward::pack>(a.parallel, *this);
    on_workers<Backward, &Backward::differentiate>(a.parallel, *this);
    on_workers<Backward, &Backward::write_keys>(a.parallel, *this);
  }
};

}  // namespace

int64_t routed_attention_forward_workspace(const RoutedAttention& a) {
  return a.query.dtype == DType::float64 ? Forward<double>(a).workspace_bytes : Forward<float>(a).workspace_bytes;
}

void routed_attention_forward(const RoutedAttention& a) {
  a.query.dtype == DType::float64 ? Forward<double>(a).run() : Forward<float>(a).run();
}

int64_t routed_attention_backward_workspace(const RoutedAttention& a) {
  const RoutedAttentionGradients none;
  return a.query.dtype == DType::float64 ? Backward<double>(a, none).workspace_bytes
                                         : Backward<float>(a, none).workspace_bytes;
}

void routed_attention_backward(const RoutedAttention& a, const RoutedAttentionGradients& grad) {
  a.query.dtype == DType::float64 ? Backward<double>(a, grad).run() : Backward<float>(a, grad).run();
}

}  // namespace RK_SIMD
}  // namespace rk
