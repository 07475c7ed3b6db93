// Multi-scale deformable attention on the CPU, plain and fused. Workers share the (batch, head, query) triples evenly
// in that order. Forward reads, and backward adds to, one head's rows at a time: [S, D] packed, small enough for
// the second cache. A worker adds to rows of its own; where two share a (batch, head) pair, their rows are
// summed in worker order afterwards: no atomics, and the same bits for the same number of threads.

#include "points.h"

namespace rk {
namespace RK_SIMD {
namespace {

template <typename T, typename Storage>
void pack_value(const Args& args, int64_t b, int64_t h, const uint8_t* mask, const Scratch<T>& scratch) {
  const int64_t row = scratch.row, stride = args.value.stride[1];
  const Storage* from =
      static_cast<const Storage*>(args.value.data) + b * args.value.stride[0] + h * args.value.stride[2];
  T* to = scratch.value_slice;
  for (int64_t s = 0; s < args.S; ++s, from += stride, to += row) {
    __builtin_prefetch(from + 16 * stride);
    const bool masked = mask != nullptr && mask[s * args.value_mask.stride[1]] != 0;
    const int64_t filled = masked ? 0 : args.D;
    for (int64_t d = 0; d < filled; ++d) to[d] = load_as<T>(from[d]);
    for (int64_t d = filled; d < row; ++d) to[d] = T(0);
  }
  for (int64_t d = 0; d < row; ++d) to[d] = T(0);
}

// Packing pays where the queries read most rows anyway; other storage types and broken vectors need it.
template <typename T>
Rows<T> value_rows(const Args& args, int64_t b, int64_t h, int64_t queries, const Scratch<T>& scratch) {
  const uint8_t* mask = static_cast<const uint8_t*>(args.value_mask.data);
  if (mask != nullptr) mask += b * args.value_mask.stride[0];
  const bool stores_t = args.value.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32);
  if (stores_t && args.D == scratch.row && queries * args.K < args.S) {
    const T* data = static_cast<const T*>(args.value.data) + b * args.value.stride[0] + h * args.value.stride[2];
    // one address space: the distance from the first row to the zeros, counted in values
    const intptr_t distance = reinterpret_cast<intptr_t>(scratch.zeros) - reinterpret_cast<intptr_t>(data);
    return {data, args.value.stride[1], int64_t(distance) / int64_t(sizeof(T)), mask, args.value_mask.stride[1]};
  }
  with_storage(args.value.dtype, [&](auto storage) { pack_value<T, decltype(storage)>(args, b, h, mask, scratch); });
  return {scratch.value_slice, scratch.row, args.S * scratch.row, nullptr, 0};
}

// ---- rows: V vectors of each corner at a time --------------------------------------------------------------------

// sum over points and corners of weight times row
template <typename T, int V>
void gather(const Scratch<T>& s, int64_t points, const T* rows, T* output) {
  constexpr int CHAINS = V <= 2 ? 4 : 2;  // independent sums, against the latency of an addition
  Vec<T> sum[CHAINS][V] = {};
  for (int64_t k = 0; k < points; ++k) {
    for (int c = 0; c < int(CORNERS); ++c) {
      const T* row = rows + s.value_at[c][k];
      const Vec<T> weight = broadcast(s.corner_weight[c][k]);
      for (int v = 0; v < V; ++v) sum[c % CHAINS][v] += weight * load(row + v * LANES<T>);
    }
  }
  for (int v = 0; v < V; ++v) {
    Vec<T> total = sum[0][v] + sum[1][v];
    if (CHAINS == 4) total += sum[CHAINS - 2][v] + sum[CHAINS - 1][v];
    store(output + v * LANES<T>, total);
  }
}

// grad_rows += weight grad_output, and the lanes of grad_output . row
template <typename T, int V>
void scatter(const Scratch<T>& s, int64_t points, bool first, const T* rows, const T* grad_output, T* grad_rows) {
  Vec<T> grad[V];
  for (int v = 0; v < V; ++v) grad[v] = load(grad_output + v * LANES<T>);
  for (int64_t k = 0; k < points; ++k) {
    for (int c = 0; c < int(CORNERS); ++c) {
      const T* row = rows + s.value_at[c][k];
      T* grad_row = grad_rows + s.grad_at[c][k];
      T* partial = s.partial[c] + k * LANES<T>;
      const Vec<T> weight = broadcast(s.corner_weight[c][k]);
      Vec<T> product = first ? Vec<T>{} : load(partial);
      for (int v = 0; v < V; ++v) {
        product += grad[v] * load(row + v * LANES<T>);
        store(grad_row + v * LANES<T>, load(grad_row + v * LANES<T>) + weight * grad[v]);
      }
      store(partial, product);
    }
  }
}

// Calls call(Vectors<V>, first channel) over the D channels in pieces of 4, 2 and 1 vectors.
template <int V>
struct Vectors {
  static constexpr int count = V;
};

template <typename T, typename Call>
inline void for_channels(int64_t row, Call call) {
  int64_t channel = 0;
  for (; channel + 4 * LANES<T> <= row; channel += 4 * LANES<T>) call(Vectors<4>{}, channel);
  if (channel + 2 * LANES<T> <= row) {
    call(Vectors<2>{}, channel);
    channel += 2 * LANES<T>;
  }
  if (channel < row) call(Vectors<1>{}, channel);
}

// ---- forward -----------------------------------------------------------------------------------------------------

template <typename T>
void forward_query(const Args& args, int64_t b, int64_t n, int64_t h, const Rows<T>& rows, const Scratch<T>& scratch) {
  if (args.fused) read_fused(args, b, n, h, scratch);
  else read_plain(args, b, n, h, scratch);
  find_corners<T, false>(scratch, rows, args.S);
  for_channels<T>(scratch.row, [&](auto vectors, int64_t channel) {
    gather<T, decltype(vectors)::count>(scratch, args.K, rows.data + channel, scratch.channels + channel);
  });
  const int64_t channels_at = ((b * args.N + n) * args.H + h) * args.D;
  write_row(scratch.channels, args.D, args.output.dtype, args.output.data, channels_at, T(1));
}

// Calls call(pair, first query, end) for every (batch, head) pair of a worker's share.
template <typename Call>
inline void for_pairs(const Args& args, int64_t worker, Call call) {
  const Share share = share_of(args.B * args.H * args.N, worker, args.parallel.workers);
  for (int64_t at = share.begin; at < share.end;) {
    const int64_t pair = at / args.N, first = at - pair * args.N;
    const int64_t end = share.end < (pair + 1) * args.N ? share.end - pair * args.N : args.N;
    call(pair, first, end);
    at = pair * args.N + end;
  }
}

template <typename T>
int64_t bytes_of_worker(const Args& args, bool backward) {
  return Scratch<T>(args, nullptr, backward).bytes;
}

template <typename T>
Scratch<T> scratch_of(const Args& args, int64_t worker, bool backward) {
  return Scratch<T>(args, args.workspace + worker * bytes_of_worker<T>(args, backward), backward);
}

template <typename T>
void forward_worker(int64_t worker, void* context) {
  const Args& args = *static_cast<const Args*>(context);
  Scratch<T> scratch = scratch_of<T>(args, worker, false);
  scratch.prepare(args);
  for_pairs(args, worker, [&](int64_t pair, int64_t first, int64_t end) {
    const int64_t b = pair / args.H, h = pair % args.H;
    const Rows<T> rows = value_rows(args, b, h, end - first, scratch);
    for (int64_t n = first; n < end; ++n) forward_query(args, b, n, h, rows, scratch);
  });
}

// ---- backward ----------------------------------------------------------------------------------------------------

// A worker adds to slice 0 for its first pair if others share it (its share starts or ends within), else to slice 1.
inline int64_t slice_of(const Args& args, const Share& share, int64_t pair) {
  const bool whole = share.begin <= pair * args.N && share.end >= (pair + 1) * args.N;
  return !whole && pair == share.begin / args.N ? 0 : 1;
}

// Rounds rows of a pair's gradient once into grad_value.
template <typename T>
void write_grad_value(const Args& args, int64_t pair, const Share& positions, const T* rows, int64_t row) {
  const int64_t b = pair / args.H, h = pair % args.H;
  const uint8_t* mask = static_cast<const uint8_t*>(args.value_mask.data);
  if (mask != nullptr) mask += b * args.value_mask.stride[0];
  with_storage(args.value.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    for (int64_t s = positions.begin; s < positions.end; ++s) {
      Storage* to = static_cast<Storage*>(args.grad_value.data) + ((b * args.S + s) * args.H + h) * args.D;
      const T* from = rows + s * row;
      const bool masked = mask != nullptr && mask[s * args.value_mask.stride[1]] != 0;
      for (int64_t d = 0; d < args.D; ++d) to[d] = store_as<Storage>(masked ? T(0) : from[d]);
    }
  });
}

template <typename T>
T* reference_parts(const Args& args) {  // [B, H, N, reference_levels, reference_size]
  char* after_scratch = args.workspace + args.parallel.workers * bytes_of_worker<T>(args, true);
  return reinterpret_cast<T*>(after_scratch);
}

template <typename T>
void backward_query(
    const Args& args, int64_t b, int64_t n, int64_t h, const Rows<T>& rows, T* grad_rows,
    const Scratch<T>& scratch) {
  if (args.fused) read_fused(args, b, n, h, scratch);
  else read_plain(args, b, n, h, scratch);
  find_corners<T, true>(scratch, rows, args.S);
  const View& grad = args.grad_output;
  const int64_t channels_at = b * grad.stride[0] + n * grad.stride[1] + h * args.D;
  read_row(scratch.channels, args.D, scratch.row, grad.dtype, grad.data, channels_at, T(1));
  for_channels<T>(scratch.row, [&](auto vectors, int64_t channel) {
    scatter<T, decltype(vectors)::count>(
        scratch, args.K, channel == 0, rows.data + channel, scratch.channels + channel, grad_rows + channel);
  });
  sample_adjoints(scratch);
  const int64_t row = (b * args.N + n) * args.H + h;
  if (!args.fused) return write_plain(args, row, scratch);
  const int64_t part = ((b * args.H + h) * args.N + n) * args.reference_levels * args.reference_size;
  write_fused(args, row, scratch, args.grad_reference.data == nullptr ? nullptr : reference_parts<T>(args) + part);
}

template <typename T>
void backward_worker(int64_t worker, void* context) {
  const Args& args = *static_cast<const Args*>(context);
  const Share share = share_of(args.B * args.H * args.N, worker, args.parallel.workers);
  Scratch<T> scratch = scratch_of<T>(args, worker, true);
  scratch.prepare(args);
  for_pairs(args, worker, [&](int64_t pair, int64_t first, int64_t end) {
    const int64_t b = pair / args.H, h = pair % args.H;
    T* grad_rows = scratch.grad_slice[slice_of(args, share, pair)];
    memset(grad_rows, 0, size_t((args.S + 1) * scratch.row) * sizeof(T));
    const Rows<T> rows = value_rows(args, b, h, end - first, scratch);
    for (int64_t n = first; n < end; ++n) backward_query(args, b, n, h, rows, grad_rows, scratch);
    if (first == 0 && end == args.N) write_grad_value(args, pair, {0, args.S}, grad_rows, scratch.row);
  });
}

// Sums, over the workers that share a pair, this worker's part of the pair's rows, in worker order.
template <typename T>
void finish_shared_pair(const Args& args, int64_t pair, const Share& positions) {
  T* sum = nullptr;
  int64_t row = 0;
  for (int64_t other = 0; other < args.parallel.workers; ++other) {
    const Share share = share_of(args.B * args.H * args.N, other, args.parallel.workers);
    if (share.begin == share.end || share.end <= pair * args.N || share.begin >= (pair + 1) * args.N) continue;
    const Scratch<T> scratch = scratch_of<T>(args, other, true);
    T* part = scratch.grad_slice[slice_of(args, share, pair)];
    row = scratch.row;
    if (sum == nullptr) sum = part;
    else
      for (int64_t i = positions.begin * row; i < positions.end * row; ++i) sum[i] += part[i];
  }
  write_grad_value(args, pair, positions, sum, row);
}

template <typename T>
void finish_references(const Args& args, const Share& queries, T* sums) {
  const int64_t size = args.reference_levels * args.reference_size;
  const T* parts = reference_parts<T>(args);
  for (int64_t query = queries.begin; query < queries.end; ++query) {
    const int64_t b = query / args.N, n = query % args.N;
    for (int64_t i = 0; i < size; ++i) sums[i] = T(0);
    for (int64_t h = 0; h < args.H; ++h)
      for (int64_t i = 0; i < size; ++i) sums[i] += parts[((b * args.H + h) * args.N + n) * size + i];
    write_row(sums, size, args.grad_reference.dtype, args.grad_reference.data, query * size, T(1));
  }
}

template <typename T>
void finish_worker(int64_t worker, void* context) {
  const Args& args = *static_cast<const Args*>(context);
  const int64_t workers = args.parallel.workers, items = args.B * args.H * args.N;
  for (int64_t other = 0, previous = -1; other < workers; ++other) {
    const int64_t end = share_of(items, other, workers).end, pair = end / args.N;
    if (end % args.N == 0 || pair == previous) continue;
    finish_shared_pair<T>(args, pair, share_of(args.S, worker, workers));
    previous = pair;
  }
  if (args.grad_reference.data == nullptr) return;
  finish_references(
      args, share_of(args.B * args.N, worker, workers), scratch_of<T>(args, worker, true).reference_sums);
}

template <typename T>
void backward(Args& args) {
  args.parallel.run(args.parallel.workers, backward_worker<T>, &args);
  const bool shares_pairs = args.B * args.H % args.parallel.workers != 0;
  if (shares_pairs || args.grad_reference.data != nullptr) args.parallel.run(args.parallel.workers, finish_worker<T>, &args);
}

}  // namespace

int64_t deform_forward_workspace(const Args& args) {
  const bool wide = args.value.dtype == DType::float64;
  return args.parallel.workers * (wide ? bytes_of_worker<double>(args, false) : bytes_of_worker<float>(args, false));
}

int64_t deform_backward_workspace(const Args& args) {
  const bool wide = args.value.dtype == DType::float64;
  const int64_t references = args.grad_reference.data == nullptr
      ? 0
      : args.B * args.H * args.N * args.reference_levels * args.reference_size * (wide ? 8 : 4);
  return args.parallel.workers * (wide ? bytes_of_worker<double>(args, true) : bytes_of_worker<float>(args, true)) +
      references;
}

void deform_forward(Args& args) {
  args.parallel.run(
      args.parallel.workers, args.value.dtype == DType::float64 ? forward_worker<double> : forward_worker<float>, &args);
}

void deform_backward(Args& args) {
  if (args.value.dtype == DType::float64) backward<double>(args);
  else backward<float>(args);
}

}  // namespace RK_SIMD
}  // namespace rk
