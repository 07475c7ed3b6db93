#pragma once
// Workers, the one way in which kernels share work among threads. Where items of several workers are added up, the
// items are parts that the shapes alone define, each summed from zero, and the sums are added in the order of the
// parts: the bits of a result do not depend on the number of threads.

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

// The parts [begin, end) of a group that a worker has, of `parts` in each of `groups`; all workers take them in order.
static inline Share parts_of_group(int64_t group, int64_t groups, int64_t parts, int64_t worker, int64_t workers) {
  const Share share = share_of(groups * parts, worker, workers);
  const int64_t first = group * parts, last = first + parts;
  const int64_t begin = share.begin > first ? share.begin : first, end = share.end < last ? share.end : last;
  return begin < end ? Share{begin - first, end - first} : Share{0, 0};
}

// Calls call(group, parts) for each group of which a worker has parts.
template <typename Call>
inline void for_groups(int64_t groups, int64_t parts, int64_t worker, int64_t workers, const Call& call) {
  const Share share = share_of(groups * parts, worker, workers);
  if (share.begin == share.end) return;
  for (int64_t group = share.begin / parts; group <= (share.end - 1) / parts; ++group)
    call(group, parts_of_group(group, groups, parts, worker, workers));
}

}  // namespace rk
