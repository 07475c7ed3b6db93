#pragma once
// A block of emulated threads, each a fiber. A thread runs until it waits for others (a shuffle or a barrier); when
// every thread that the wait names has come to the same place, all go on. Waiting for what never comes is an error.

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace simt {

constexpr int WARP = 32;

enum class Meeting { none, shuffle, warp_barrier, block_barrier };

struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
  }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

class Block {
 public:
  Block(int64_t index, int threads, int64_t shared_bytes, Memory& memory, bool backwards);

  // Runs `body` once a thread.
  void run(const std::function<void()>& body);

  static Block& current() { return *running; }
  int64_t index() const { return block_index; }
  int size() const { return int(threads.size()); }
  int thread() const { return active; }
  int64_t thread_of_grid() const { return block_index * size() + active + 1; }  // 0 is nobody
  Memory& global() { return memory; }

  // The value that lane `source` of the warp gave.
  uint64_t shuffle(unsigned mask, uint64_t value, int source, Site site);
  void wait(Meeting meeting, unsigned mask, Site site);

  void read_shared(int64_t at, void* to, int64_t size, int64_t alignment) {
    shared.read(at, to, size, alignment, active, threads[size_t(active)]->clock);
  }
  void write_shared(int64_t at, const void* from, int64_t size, int64_t alignment) {
    shared.write(at, from, size, alignment, active, threads[size_t(active)]->clock);
  }

 private:
  struct Thread {
    ucontext_t context;  // where it starts
    jmp_buf left_at;
    bool started = false;
    Meeting meeting = Meeting::none;
    unsigned mask = 0;
    Site site{"", 0};
    uint64_t value = 0, received = 0;
    int source = 0;
    bool done = false;
    Clock clock;
  };

  static thread_local Block* running;
  static void enter();

  int64_t block_index;
  Memory& memory;
  SharedMemory shared;
  bool backwards;
  std::vector<std::unique_ptr<Thread>> threads;
  jmp_buf scheduler;
  int active = -1;
  std::vector<int> named;
  const std::function<void()>* body = nullptr;
  std::string error;

  void resume(int thread);
  bool meet();
  bool meet_warp(int first);
  void release(const std::vector<int>& met);
  [[noreturn]] void report_deadlock() const;
};

}  // namespace simt
