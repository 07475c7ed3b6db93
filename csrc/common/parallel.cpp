#include "parallel.h"

#include <pthread.h>

#include <system_error>
#include <thread>
#include <vector>

namespace rk {
namespace {

bool forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

void run_on_new_threads(int64_t workers, Parallel::Body body, const void* context) {
  std::vector<std::thread> threads;
  threads.reserve(size_t(workers));
  for (int64_t worker = 1; worker < workers; ++worker) {
    try {
      threads.emplace_back(body, worker, context);
    } catch (const std::system_error&) {  // no more threads are to be had
      body(worker, context);
    }
  }
  body(0, context);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace rk
