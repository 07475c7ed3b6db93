#pragma once
// Threads as the kernels see them: `run(workers, body, context)` calls body(worker, context) once for each worker.
// What a worker does is a function of (shapes, worker, workers) alone, so results repeat for a given thread count.

#include <stdint.h>

namespace rk {

using WorkerBody = void (*)(int64_t worker, void* context);

struct Parallel {
  int64_t workers;
  void (*run)(int64_t workers, WorkerBody body, void* context);
};

// A child of fork() has none of its parent's threads, but GNU OpenMP waits for them: there a parallel region starts its
// own.
bool in_forked_child();
void run_on_new_threads(int64_t workers, WorkerBody body, void* context);

// Contiguous, near-equal shares of `items` in order.
struct Share {
  int64_t begin, end;
};

static inline Share share_of(int64_t items, int64_t worker, int64_t workers) {
  return {items * worker / workers, items * (worker + 1) / workers};
}

}  // namespace rk
