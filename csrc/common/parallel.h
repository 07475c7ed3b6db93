#pragma once
// Workers, the one way in which kernels share work among threads. A worker's task is a function of (shapes, worker,
// workers) alone, so results repeat for a given thread count.

#include <stdint.h>

namespace rk {

struct Parallel {
  using Body = void (*)(int64_t worker, const void* context);

  int64_t workers;
  void (*run)(int64_t workers, Body body, const void* context);  // calls body(worker, context) once for each worker

  // Calls body(worker) once for each worker.
  template <typename Call>
  void each(const Call& body) const {
    run(workers, [](int64_t worker, const void* context) { (*static_cast<const Call*>(context))(worker); }, &body);
  }
};

// A child of fork() has none of its parent's threads, but GNU OpenMP waits for them: there a parallel region starts its
// own.
bool in_forked_child();
void run_on_new_threads(int64_t workers, Parallel::Body body, const void* context);

// Contiguous, near-equal shares of `items` in order.
struct Share {
  int64_t begin, end;
};

static inline Share share_of(int64_t items, int64_t worker, int64_t workers) {
  return {items * worker / workers, items * (worker + 1) / workers};
}

}  // namespace rk
