// Multi-scale deformable attention on the CPU, plain and fused. Workers share the (batch, head, query) triples evenly
// in that order. Forward reads, and backward adds to, one head's rows at a time: [S, D] packed, small enough for
// the second cache. Backward adds over parts of a pair's queries, then over the parts in their order: no atomics, and
// the same bits for any number of threads.

#include "points.h"

namespace rk::ms_deform_attn::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

template <typename Storage>
void pack_value(const Args& args, int64_t b, int64_t h, const uint8_t* mask, int64_t row, Storage* to) {
  const int64_t stride = args.value.stride[1];
  const Storage* from =
      static_cast<const Storage*>(args.value.data) + b * args.value.stride[0] + h * args.value.stride[2];
  for (int64_t s = 0; s < args.S; ++s, from += stride, to += row) {
    __builtin_prefetch(from + 16 * stride);
    const bool masked = mask != nullptr && mask[s * args.value_mask.stride[1]] != 0;
    const int64_t filled = masked ? 0 : args.D;
    for (int64_t d = 0; d < filled; ++d) to[d] = from[d];
    for (int64_t d = filled; d < row; ++d) to[d] = Storage{};
  }
  for (int64_t d = 0; d < row; ++d) to[d] = Storage{};
}

// Packing pays where the queries read most rows anyway; broken vectors need it.
template <typename T, typename Storage>
Rows value_rows(const Args& args, int64_t b, int64_t h, int64_t queries, const Scratch<T>& s) {
  const uint8_t* mask = static_cast<const uint8_t*>(args.value_mask.data);
  if (mask != nullptr) mask += b * args.value_mask.stride[0];
  if (args.D == s.row && queries * args.K < args.S) {
    const Storage* data =
        static_cast<const Storage*>(args.value.data) + b * args.value.stride[0] + h * args.value.stride[2];
    // one address space: the distance from the first row to the zeros, counted in values
    const intptr_t distance = reinterpret_cast<intptr_t>(s.zeros) - reinterpret_cast<intptr_t>(data);
    return {data, args.value.stride[1], int64_t(distance) / int64_t(sizeof(Storage)), mask, args.value_mask.stride[1]};
  }
  pack_value(args, b, h, mask, s.row, reinterpret_cast<Storage*>(s.value_slice));
  return {s.value_slice, s.row, args.S * s.row, nullptr, 0};
}

// ---- rows: V vectors of each corner at a time --------------------------------------------------------------------

template <int V>
struct Vectors {
  static constexpr int count = V;
};

// Calls call(Vectors<V>, first channel) over the channels of a row in pieces of 4, 2 and 1 vectors.
template <typename T, typename Call>
inline RK_INLINE void for_channels(int64_t row, Call call) {
  int64_t channel = 0;
  for (; channel + 4 * LANES<T> <= row; channel += 4 * LANES<T>) call(Vectors<4>{}, channel);
  if (channel + 2 * LANES<T> <= row) {
    call(Vectors<2>{}, channel);
    channel += 2 * LANES<T>;
  }
  if (channel < row) call(Vectors<1>{}, channel);
}

inline int64_t points_of_block(const Args& args, int64_t block) { return smaller(args.K - block * BLOCK, BLOCK); }

// sum over points and corners of weight times row
template <typename T, typename Storage, int V>
void gather(const Args& args, int64_t blocks, const PointBlock<T>* points, const Storage* rows, T* output) {
  constexpr int CHAINS = V <= 2 ? 4 : 2;  // independent sums, against the latency of an addition
  Vec<T> sum[CHAINS][V] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const PointBlock<T>& p = points[block];
    const int64_t count = points_of_block(args, block);
    for (int64_t i = 0; i < count; ++i) {
      for (int c = 0; c < int(CORNERS); ++c) {
        const Storage* row = rows + p.value_at[c][i];
        const Vec<T> weight = broadcast(p.corner_weight[c][i]);
        for (int v = 0; v < V; ++v) sum[c % CHAINS][v] += weight * load_vector<T>(row + v * LANES<T>);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    Vec<T> total = sum[0][v] + sum[1][v];
    if (CHAINS == 4) total += sum[CHAINS - 2][v] + sum[CHAINS - 1][v];
    store(output + v * LANES<T>, total);
  }
}

// grad_rows += weight grad_output, and the lanes of grad_output . row, of the points of one block
template <typename T, typename Storage, int V, bool FIRST>
void scatter(
    const PointBlock<T>& p, int64_t count, const Storage* rows, const T* grad_output, T* grad_rows, T* products) {
  Vec<T> grad[V];
  for (int v = 0; v < V; ++v) grad[v] = load(grad_output + v * LANES<T>);
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < int(CORNERS); ++c) {
      const Storage* row = rows + p.value_at[c][i];
      T* grad_row = grad_rows + p.grad_at[c][i];
      T* lanes = products + (c * BLOCK + i) * LANES<T>;
      const Vec<T> weight = broadcast(p.corner_weight[c][i]);
      Vec<T> product = FIRST ? Vec<T>{} : load(lanes);
      for (int v = 0; v < V; ++v) {
        product += grad[v] * load_vector<T>(row + v * LANES<T>);
        store(grad_row + v * LANES<T>, load(grad_row + v * LANES<T>) + weight * grad[v]);
      }
      store(lanes, product);
    }
  }
}

// ---- a worker's share --------------------------------------------------------------------------------------------

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

// always_inline: GCC takes a function of prefetches alone for one without effects and drops its calls
inline RK_INLINE void prefetch_row(const View& view, int64_t offset, int64_t count) {
  const int64_t size = bytes_of(view.dtype);
  const char* row = static_cast<const char*>(view.data) + offset * size;
  for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(row + byte);
}

inline int64_t row_of_channels(const View& view, const Args& args, int64_t b, int64_t n, int64_t h) {
  return b * view.stride[0] + n * view.stride[1] + h * args.D;
}

// One head's rows are far apart, each in a page of its own: asked for together, their page walks overlap.
inline RK_INLINE void prefetch_queries(
    const Args& args, int64_t b, int64_t first, int64_t end, int64_t h, const View& channels) {
  for (int64_t n = first; n < end; ++n) {
    prefetch_row(args.places, row_of_points(args.places, b, n, h), 2 * args.K);
    prefetch_row(args.weights, row_of_points(args.weights, b, n, h), args.K);
    prefetch_row(channels, row_of_channels(channels, args, b, n, h), args.D);
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

// ---- forward -----------------------------------------------------------------------------------------------------

template <typename T, typename Storage>
void forward_pair(const Args& args, int64_t pair, int64_t first, int64_t end, const Scratch<T>& s) {
  const int64_t b = pair / args.H, h = pair % args.H;
  const Rows rows = value_rows<T, Storage>(args, b, h, end - first, s);
  for (int64_t n0 = first; n0 < end; n0 += QUERIES) {
    const int64_t n1 = smaller(n0 + QUERIES, end);
    prefetch_queries(args, b, n1, smaller(n1 + QUERIES, end), h, args.output);
    for (int64_t n = n0; n < n1; ++n) plan<T, false>(args, b, n, h, rows, s, s.points + (n - n0) * s.blocks);
    for (int64_t n = n0; n < n1; ++n) {
      for_channels<T>(s.row, [&](auto vectors, int64_t channel) {
        gather<T, Storage, decltype(vectors)::count>(
            args, s.blocks, s.points + (n - n0) * s.blocks, static_cast<const Storage*>(rows.data) + channel,
            s.channels + channel);
      });
      const int64_t offset = row_of_channels(args.output, args, b, n, h);
      write_row(s.channels, args.D, args.output.dtype, args.output.data, offset, T(1));
    }
  }
}

template <typename T>
void forward_worker(const Args& args, int64_t worker) {
  Scratch<T> scratch = scratch_of<T>(args, worker, false);
  scratch.prepare(args);
  for_pairs(args, worker, [&](int64_t pair, int64_t first, int64_t end) {
    with_storage_of<T>(
        args.value.dtype, [&](auto storage) { forward_pair<T, decltype(storage)>(args, pair, first, end, scratch); });
  });
}

// ---- backward ----------------------------------------------------------------------------------------------------

inline Share parts_of(const Args& args, int64_t pair, int64_t worker) {
  return parts_of_group(pair, args.B * args.H, parts_of_pair(args), worker, args.parallel.workers);
}

// Where the rows of a worker's part are summed, of `mine` of the same pair; its first part's slice ends as their sum.
template <typename T>
T* grad_slice(const Args& args, const Scratch<T>& s, const Share& mine, int64_t part) {
  const int64_t last = slices_of_worker(args) - 1;
  const int64_t index = mine.begin > 0 ? part - mine.begin : part > 0 ? last : larger(last - 1, 0);
  return s.grad_slices + index * (args.S + 1) * s.row;
}

// Rounds rows of a pair's gradient once into grad_value.
template <typename T>
void write_grad_value(const Args& args, int64_t pair, const Share& positions, const T* rows, int64_t row) {
  const int64_t b = pair / args.H, h = pair % args.H;
  const uint8_t* mask = static_cast<const uint8_t*>(args.value_mask.data);
  if (mask != nullptr) mask += b * args.value_mask.stride[0];
  with_storage_of<T>(args.value.dtype, [&](auto storage) {
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

template <typename T, typename Storage>
void backward_part(
    const Args& args, int64_t pair, const Share& queries, const Rows& rows, T* grad_rows, const Scratch<T>& s) {
  const int64_t b = pair / args.H, h = pair % args.H, reference_row = args.reference_levels * args.reference_size;
  const int64_t first = queries.begin, end = queries.end;
  memset(grad_rows, 0, size_t((args.S + 1) * s.row) * sizeof(T));
  const View& grad_output = args.grad_output;
  for (int64_t n0 = first; n0 < end; n0 += QUERIES) {
    const int64_t n1 = smaller(n0 + QUERIES, end);
    prefetch_queries(args, b, n1, smaller(n1 + QUERIES, end), h, grad_output);
    for (int64_t n = n0; n < n1; ++n) plan<T, true>(args, b, n, h, rows, s, s.points + (n - n0) * s.blocks);
    for (int64_t n = n0; n < n1; ++n) {
      PointBlock<T>* points = s.points + (n - n0) * s.blocks;
      const int64_t offset = row_of_channels(grad_output, args, b, n, h);
      read_row(s.channels, args.D, s.row, grad_output.dtype, grad_output.data, offset, T(1));
      for (int64_t block = 0; block < s.blocks; ++block) {
        const int64_t count = points_of_block(args, block);
        const Storage* values = static_cast<const Storage*>(rows.data);
        for_channels<T>(s.row, [&](auto vectors, int64_t channel) {
          constexpr int V = decltype(vectors)::count;
          const auto add = channel == 0 ? scatter<T, Storage, V, true> : scatter<T, Storage, V, false>;
          add(points[block], count, values + channel, s.channels + channel, grad_rows + channel, s.products);
        });
        sample_adjoints(s.products, points[block]);
      }
      T* grad_reference = args.grad_reference.data == nullptr
          ? nullptr
          : reference_parts<T>(args) + (pair * args.N + n) * reference_row;
      write_gradients(args, (b * args.N + n) * args.H + h, s, points, grad_reference);
    }
  }
}

template <typename T, typename Storage>
void backward_pair(const Args& args, int64_t pair, const Share& mine, const Scratch<T>& s) {
  const int64_t parts = parts_of_pair(args), values = (args.S + 1) * s.row;
  const int64_t queries = share_of(args.N, mine.end - 1, parts).end - share_of(args.N, mine.begin, parts).begin;
  const Rows rows = value_rows<T, Storage>(args, pair / args.H, pair % args.H, queries, s);
  T* sum = grad_slice(args, s, mine, mine.begin);
  for (int64_t part = mine.begin; part < mine.end; ++part) {
    T* grad_rows = grad_slice(args, s, mine, part);
    backward_part<T, Storage>(args, pair, share_of(args.N, part, parts), rows, grad_rows, s);
    if (mine.begin == 0 && part > 0)
      for (int64_t i = 0; i < values; ++i) sum[i] += grad_rows[i];
  }
  if (mine.end - mine.begin == parts) write_grad_value(args, pair, {0, args.S}, sum, s.row);
}

template <typename T>
void backward_worker(const Args& args, int64_t worker) {
  Scratch<T> scratch = scratch_of<T>(args, worker, true);
  scratch.prepare(args);
  for_groups(args.B * args.H, parts_of_pair(args), worker, args.parallel.workers, [&](int64_t pair, const Share& mine) {
    with_storage_of<T>(
        args.value.dtype, [&](auto storage) { backward_pair<T, decltype(storage)>(args, pair, mine, scratch); });
  });
}

// Sums the parts of a pair that several workers have, of these positions.
template <typename T>
void finish_shared_pair(const Args& args, int64_t pair, const Share& positions) {
  T* sum = nullptr;
  int64_t row = 0;
  for (int64_t other = 0; other < args.parallel.workers; ++other) {
    const Share mine = parts_of(args, pair, other);
    const Scratch<T> scratch = scratch_of<T>(args, other, true);
    row = scratch.row;
    // slices of parts that a worker added up itself are one
    for (int64_t part = mine.begin; part < (mine.begin == 0 ? smaller(mine.end, 1) : mine.end); ++part) {
      T* rows = grad_slice(args, scratch, mine, part);
      if (sum == nullptr) sum = rows;
      else
        for (int64_t i = positions.begin * row; i < positions.end * row; ++i) sum[i] += rows[i];
    }
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
void finish_worker(const Args& args, int64_t worker) {
  const int64_t workers = args.parallel.workers, parts = parts_of_pair(args);
  for (int64_t other = 0, previous = -1; other < workers; ++other) {
    const int64_t end = share_of(args.B * args.H * parts, other, workers).end, pair = end / parts;
    if (end % parts == 0 || pair == previous) continue;
    finish_shared_pair<T>(args, pair, share_of(args.S, worker, workers));
    previous = pair;
  }
  if (args.grad_reference.data == nullptr) return;
  finish_references(args, share_of(args.B * args.N, worker, workers), scratch_of<T>(args, worker, true).reference_sums);
}

template <typename T>
void backward_all(const Args& args) {
  if (args.N == 0) {
    const int64_t count = args.B * args.S * args.H * args.D;
    memset(args.grad_value.data, 0, size_t(count * bytes_of(args.grad_value.dtype)));
    return;
  }
  args.parallel.each([&](int64_t worker) { backward_worker<T>(args, worker); });
  const bool shares_pairs = parts_of_pair(args) > 1 && args.parallel.workers > 1;
  if (shares_pairs || args.grad_reference.data != nullptr)
    args.parallel.each([&](int64_t worker) { finish_worker<T>(args, worker); });
}

int64_t bytes_of_workers(const Args& args, bool backward) {
  const bool wide = args.value.dtype == DType::float64;
  return args.parallel.workers *
      (wide ? bytes_of_worker<double>(args, backward) : bytes_of_worker<float>(args, backward));
}

}  // namespace

int64_t forward_workspace(const Args& args) { return bytes_of_workers(args, false); }

void forward(const Args& args) {
  const auto work = args.value.dtype == DType::float64 ? forward_worker<double> : forward_worker<float>;
  args.parallel.each([&](int64_t worker) { work(args, worker); });
}

int64_t backward_workspace(const Args& args) {
  const int64_t queries = args.grad_reference.data == nullptr ? 0 : args.B * args.H * args.N;
  const int64_t size = args.value.dtype == DType::float64 ? 8 : 4;
  return bytes_of_workers(args, true) + queries * args.reference_levels * args.reference_size * size;
}

void backward(const Args& args) {
  args.value.dtype == DType::float64 ? backward_all<double>(args) : backward_all<float>(args);
}

}  // namespace rk::ms_deform_attn::RK_SIMD
