// s_i = (1/N) sum_{j != i} relu(x^_i . x^_j): cosines are summed as they leave the registers of the product.
// Each worker owns whole blocks of queries.

#include "../common/gemm.h"
#include "../common/rows.h"
#include "args.h"
#include "math.h"

namespace rk::query_similarity::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

constexpr int64_t BLOCK_N = 64;  // queries of a block

// Queries they are compared with: one register block wide, so that all their channels stay in the first-level cache.
template <typename T>
constexpr int64_t BLOCK_M = 2 * LANES<T>;

template <typename T>
struct Workspace {
  int64_t tiles_of_image;
  T* unit;     // [B, N, C] x^
  T* flipped;  // [B, tiles, C, BLOCK_M] x^, a column a query
  int64_t bytes;

  explicit Workspace(const Args& a) {
    Blocks blocks(a.workspace);
    tiles_of_image = (a.queries + BLOCK_M<T> - 1) / BLOCK_M<T>;
    unit = blocks.take<T>(a.batch * a.queries * a.channels);
    flipped = blocks.take<T>(a.batch * tiles_of_image * a.channels * BLOCK_M<T>);
    bytes = blocks.used + ALIGNMENT;
  }
};

template <typename T>
void normalize(const Args& a, const Workspace<T>& w, int64_t worker) {
  const int64_t groups = w.tiles_of_image;
  const Share share = share_of(a.batch * groups, worker, a.parallel.workers);
  for (int64_t item = share.begin; item < share.end; ++item) {
    const int64_t b = item / groups, first = item % groups * BLOCK_M<T>;
    const int64_t rows = smaller(a.queries - first, BLOCK_M<T>);
    T* unit = w.unit + (b * a.queries + first) * a.channels;
    for (int64_t i = 0; i < rows; ++i) {
      T* row = unit + i * a.channels;
      read_row<T>(
          row, a.channels, a.channels, a.x.dtype, a.x.data, b * a.x.stride[0] + (first + i) * a.x.stride[1], T(1));
      T squared = 0;
      for (int64_t c = 0; c < a.channels; ++c) squared += row[c] * row[c];
      const T factor = inverse_norm<T>(squared, square_root);
      for (int64_t c = 0; c < a.channels; ++c) row[c] *= factor;
    }
    T* columns = w.flipped + item * a.channels * BLOCK_M<T>;
    transpose(unit, a.channels, rows, a.channels, columns, BLOCK_M<T>);
    for (int64_t c = 0; c < a.channels; ++c)
      for (int64_t j = rows; j < BLOCK_M<T>; ++j) columns[c * BLOCK_M<T> + j] = 0;
  }
}

template <typename T>
void sum_similarities(const Args& a, const Workspace<T>& w, int64_t worker) {
  const int64_t groups = (a.queries + BLOCK_N - 1) / BLOCK_N;
  const Share share = share_of(a.batch * groups, worker, a.parallel.workers);
  for (int64_t item = share.begin; item < share.end; ++item) {
    const int64_t b = item / groups, first = item % groups * BLOCK_N;
    const int64_t rows = smaller(a.queries - first, BLOCK_N);
    Vec<T> lanes[BLOCK_N] = {};
    for (int64_t j = 0; j < a.queries; j += BLOCK_M<T>)
      gemm<T>(
          rows, BLOCK_M<T>, a.channels, {w.unit + (b * a.queries + first) * a.channels, a.channels},
          {w.flipped + (b * w.tiles_of_image * BLOCK_M<T> + j) * a.channels, BLOCK_M<T>},
          [&](int64_t i, int64_t c, Vec<T> cosine) RK_INLINE {
            Vec<T> similarity = cosine < 0 ? Vec<T>{} : cosine;  // a NaN stays one
            const int64_t own_lane = first + i - (j + c);
            if (own_lane >= 0 && own_lane < LANES<T>) similarity[own_lane] = 0;
            lanes[i] += similarity;
          });
    T sums[BLOCK_N];
    for (int64_t i = 0; i < rows; ++i) sums[i] = sum_of_lanes<T>(lanes[i]);
    write_row<T>(sums, rows, a.output.dtype, a.output.data, b * a.output.stride[0] + first, T(1) / T(a.queries));
  }
}

template <typename T>
void run(const Args& a) {
  const Workspace<T> w(a);
  a.parallel.each([&](int64_t worker) { normalize(a, w, worker); });
  a.parallel.each([&](int64_t worker) { sum_similarities(a, w, worker); });
}

}  // namespace

int64_t forward_workspace(const Args& a) {
  return a.x.dtype == DType::float64 ? Workspace<double>(a).bytes : Workspace<float>(a).bytes;
}

void forward(const Args& a) {
  if (a.batch == 0 || a.queries == 0) return;
  a.x.dtype == DType::float64 ? run<double>(a) : run<float>(a);
}

}  // namespace rk::query_similarity::RK_SIMD
