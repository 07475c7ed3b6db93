// LayerNorm of a sum, a token at a time; its backward reads the output. Each worker owns whole tokens, and whole parts
// of the sums over tokens, so there are no atomics and results do not depend on the number of workers.

#include "../common/rows.h"
#include "args.h"
#include "math.h"

namespace rk::add_layer_norm::RK_SIMD {

using namespace rk::RK_SIMD;

namespace {

// Relative error of rounding to a storage type.
template <typename T>
T unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::float64: return T(1.1102230246251565e-16);  // 2^-53
    case DType::float32: return T(5.9604644775390625e-8);   // 2^-24
    case DType::float16: return T(4.8828125e-4);            // 2^-11
    default: return T(3.90625e-3);                          // 2^-8
  }
}

constexpr int64_t ROWS_OF_WORKER = 7;

// The rows of one worker, each padded with zeros to whole vectors.
template <typename T>
struct Rows {
  int64_t width;
  T *weight, *bias, *inverse_weight, *first, *second, *weight_sum, *bias_sum;

  Rows(const Args& a, int64_t worker) {
    width = round_up_to_lanes<T>(a.C);
    Blocks blocks(a.workspace);
    T* const rows = blocks.take<T>(a.parallel.workers * ROWS_OF_WORKER * width) + worker * ROWS_OF_WORKER * width;
    T** const names[ROWS_OF_WORKER] = {&weight, &bias, &inverse_weight, &first, &second, &weight_sum, &bias_sum};
    for (int64_t i = 0; i < ROWS_OF_WORKER; ++i) *names[i] = rows + i * width;
    read_row<T>(weight, a.C, width, a.weight.dtype, a.weight.data, 0, T(1));
    read_row<T>(bias, a.C, width, a.bias.dtype, a.bias.data, 0, T(1));
  }
};

template <typename T>
void forward_tokens(const Args& a, int64_t worker) {
  const Rows<T> rows(a, worker);
  T *const s = rows.first, *const residual = rows.second;
  const Share share = share_of(a.T, worker, a.parallel.workers);
  for (int64_t t = share.begin; t < share.end; ++t) {
    read_row<T>(s, a.C, rows.width, a.x.dtype, a.x.data, t * a.x.stride[0], T(1));
    read_row<T>(residual, a.C, rows.width, a.residual.dtype, a.residual.data, t * a.residual.stride[0], T(1));
    Vec<T> total{};
    for (int64_t c = 0; c < rows.width; c += LANES<T>) {
      const Vec<T> sum = load(s + c) + load(residual + c);
      store(s + c, sum);
      total += sum;
    }
    const T mean = sum_of_lanes<T>(total) / T(a.C);
    for (int64_t c = 0; c < a.C; ++c) s[c] -= mean;
    Vec<T> squares{};
    for (int64_t c = 0; c < rows.width; c += LANES<T>) squares += load(s + c) * load(s + c);
    const T rstd = 1 / square_root(sum_of_lanes<T>(squares) / T(a.C) + T(a.eps));
    T* const y = residual;
    for (int64_t c = 0; c < rows.width; c += LANES<T>) {
      const Vec<T> x_hat = load(s + c) * rstd;
      store(s + c, x_hat);
      store(y + c, scaled_and_shifted<Vec<T>>(x_hat, load(rows.weight + c), load(rows.bias + c)));
    }
    write_row<T>(y, a.C, a.output.dtype, a.output.data, t * a.C, T(1));
    static_cast<T*>(a.rstd.data)[t] = rstd;
    if (a.kept == a.C) {
      write_row<T>(s, a.C, a.normalized.dtype, a.normalized.data, t * a.C, T(1));
    } else {
      for (int64_t k = 0; k < a.kept; ++k)
        write_row<T>(s + a.channels[k], 1, a.normalized.dtype, a.normalized.data, t * a.kept + k, T(1));
    }
  }
}

template <typename T>
void read_normalized(const Args& a, const Rows<T>& rows, int64_t t, T* x_hat) {
  if (a.kept == a.C) {
    read_row<T>(x_hat, a.C, rows.width, a.normalized.dtype, a.normalized.data, t * a.C, T(1));
    return;
  }
  read_row<T>(x_hat, a.C, rows.width, a.output.dtype, a.output.data, t * a.C, T(1));
  for (int64_t c = 0; c < rows.width; c += LANES<T>)
    store(x_hat + c, normalized_of<Vec<T>>(load(x_hat + c), load(rows.inverse_weight + c), load(rows.bias + c)));
  for (int64_t k = 0; k < a.kept; ++k)
    read_row<T>(x_hat + a.channels[k], 1, 1, a.normalized.dtype, a.normalized.data, t * a.kept + k, T(1));
}

template <typename T>
void backward_parts(const Args& a, int64_t worker) {
  const Rows<T> rows(a, worker);
  const T roundoff = unit_roundoff<T>(a.output.dtype);
  for (int64_t c = 0; c < rows.width; ++c) {
    const T size = rows.weight[c] < 0 ? -rows.weight[c] : rows.weight[c];
    const T shift = rows.bias[c] < 0 ? -rows.bias[c] : rows.bias[c];
    rows.inverse_weight[c] = c >= a.C ? T(0) : size > roundoff * shift ? 1 / rows.weight[c] : T(__builtin_nan(""));
  }
  T *const dy = rows.first, *const x_hat = rows.second;
  const Share share = share_of(a.parts, worker, a.parallel.workers);
  for (int64_t part = share.begin; part < share.end; ++part) {
    for (int64_t c = 0; c < rows.width; ++c) rows.weight_sum[c] = rows.bias_sum[c] = 0;
    const Share tokens = share_of(a.T, part, a.parts);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
      read_row<T>(dy, a.C, rows.width, a.grad_output.dtype, a.grad_output.data, t * a.grad_output.stride[0], T(1));
      read_normalized(a, rows, t, x_hat);
      Vec<T> g_total{}, g_x_hat_total{};
      for (int64_t c = 0; c < rows.width; c += LANES<T>) {
        const Vec<T> d = load(dy + c), x = load(x_hat + c), g = d * load(rows.weight + c);
        store(rows.weight_sum + c, load(rows.weight_sum + c) + d * x);
        store(rows.bias_sum + c, load(rows.bias_sum + c) + d);
        store(dy + c, g);
        g_total += g;
        g_x_hat_total += g * x;
      }
      const Vec<T> mean_g = broadcast(sum_of_lanes<T>(g_total) / T(a.C));
      const Vec<T> mean_g_x_hat = broadcast(sum_of_lanes<T>(g_x_hat_total) / T(a.C));
      const Vec<T> rstd = broadcast(static_cast<const T*>(a.rstd.data)[t]);
      for (int64_t c = 0; c < rows.width; c += LANES<T>)
        store(dy + c, sum_adjoint<Vec<T>>(load(dy + c), load(x_hat + c), mean_g, mean_g_x_hat, rstd));
      write_row<T>(dy, a.C, a.grad_sum.dtype, a.grad_sum.data, t * a.C, T(1));
    }
    T* const sums = static_cast<T*>(a.sums.data) + part * 2 * a.C;
    for (int64_t c = 0; c < a.C; ++c) {
      sums[c] = rows.weight_sum[c];
      sums[a.C + c] = rows.bias_sum[c];
    }
  }
}

}  // namespace

int64_t forward_workspace(const Args& a) {
  const bool wide = a.rstd.dtype == DType::float64;
  const int64_t width = wide ? round_up_to_lanes<double>(a.C) * 8 : round_up_to_lanes<float>(a.C) * 4;
  return a.parallel.workers * ROWS_OF_WORKER * width + 2 * ALIGNMENT;
}

void forward(const Args& a) {
  const auto work = a.rstd.dtype == DType::float64 ? forward_tokens<double> : forward_tokens<float>;
  a.parallel.each([&](int64_t worker) { work(a, worker); });
}

int64_t backward_workspace(const Args& a) { return forward_workspace(a); }

void backward(const Args& a) {
  const auto work = a.rstd.dtype == DType::float64 ? backward_parts<double> : backward_parts<float>;
  a.parallel.each([&](int64_t worker) { work(a, worker); });
}

}  // namespace rk::add_layer_norm::RK_SIMD
