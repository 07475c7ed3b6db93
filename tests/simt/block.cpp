#include "block.h"

#include <string.h>

#include <algorithm>
#include <sstream>

namespace simt {
namespace {

constexpr size_t STACK_BYTES = 64 * 1024;

// The stacks of a block's threads, kept for the next block.
char* stack_of(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (int(stacks.size()) <= thread) stacks.emplace_back(new char[STACK_BYTES]);
  return stacks[size_t(thread)].get();
}

}  // namespace

thread_local Block* Block::running = nullptr;

Block::Block(int64_t index, int count, int64_t shared_bytes, Memory& memory, bool backwards)
    : block_index(index), memory(memory), shared(shared_bytes), backwards(backwards) {
  if (count % WARP != 0) throw Error("a block of " + std::to_string(count) + " threads has a broken warp");
  for (int i = 0; i < count; ++i) {
    threads.emplace_back(new Thread);
    threads.back()->clock.assign(size_t(count), 0);
    threads.back()->clock[size_t(i)] = 1;
  }
}

void Block::enter() {
  Block& block = *running;
  try {
    (*block.body)();
  } catch (const Error& error) {
    std::ostringstream text;
    text << "thread " << block.active << " of block " << block.block_index << " " << error.what();
    block.error = text.str();
  }
  block.threads[size_t(block.active)]->done = true;
  _longjmp(block.scheduler, 1);
}

// A fiber is entered as a context, and left and resumed by jumps, which ask nothing of the operating system.
void Block::resume(int chosen) {
  active = chosen;
  Thread& thread = *threads[size_t(chosen)];
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.left_at, 1);
    thread.started = true;
    setcontext(&thread.context);
  }
  if (!error.empty()) throw Error(error);
}

void Block::run(const std::function<void()>& of_thread) {
  running = this;
  body = &of_thread;
  for (int i = 0; i < size(); ++i) {
    ucontext_t& context = threads[size_t(i)]->context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_of(i);
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, &Block::enter, 0);
  }
  for (;;) {
    bool all_done = true;
    for (int i = 0; i < size(); ++i) {
      const int chosen = backwards ? size() - 1 - i : i;
      Thread& thread = *threads[size_t(chosen)];
      if (!thread.done && thread.meeting == Meeting::none) resume(chosen);
      all_done = all_done && thread.done;
    }
    if (all_done) return;
    if (!meet()) report_deadlock();
  }
}

void Block::wait(Meeting meeting, unsigned mask, Site site) {
  Thread& thread = *threads[size_t(active)];
  if (meeting != Meeting::block_barrier && (mask >> (active % WARP) & 1) == 0)
    throw Error("waits at " + site.text() + " with a mask that does not name it");
  thread.meeting = meeting, thread.mask = mask, thread.site = site;
  if (_setjmp(thread.left_at) == 0) _longjmp(scheduler, 1);
}

uint64_t Block::shuffle(unsigned mask, uint64_t value, int source, Site site) {
  Thread& thread = *threads[size_t(active)];
  if ((mask >> source & 1) == 0)
    throw Error("shuffles at " + site.text() + " from lane " + std::to_string(source) + ", not in its mask");
  thread.value = value, thread.source = source;
  wait(Meeting::shuffle, mask, site);
  return thread.received;
}

bool Block::meet() {
  bool met = false;
  for (int first = 0; first < size(); first += WARP) met = meet_warp(first) || met;
  if (met) return true;
  std::vector<int> waiting;
  for (int i = 0; i < size(); ++i) {
    const Thread& thread = *threads[size_t(i)];
    if (thread.done) continue;
    if (thread.meeting != Meeting::block_barrier) return false;
    waiting.push_back(i);
  }
  for (int i : waiting)
    if (!(threads[size_t(i)]->site == threads[size_t(waiting[0])]->site)) return false;
  release(waiting);
  return true;
}

// Lets go on the lanes that have come to a meeting with all lanes that its mask names.
bool Block::meet_warp(int first) {
  bool met = false;
  for (int lane = 0; lane < WARP; ++lane) {
    const Thread& thread = *threads[size_t(first + lane)];
    if (thread.done || (thread.meeting != Meeting::shuffle && thread.meeting != Meeting::warp_barrier)) continue;
    named.clear();
    for (int other = 0; other < WARP; ++other)
      if (thread.mask >> other & 1) named.push_back(first + other);
    const bool all_here = std::all_of(named.begin(), named.end(), [&](int i) {
      const Thread& partner = *threads[size_t(i)];
      return !partner.done && partner.meeting == thread.meeting && partner.mask == thread.mask &&
          partner.site == thread.site;
    });
    if (!all_here) continue;
    if (thread.meeting == Meeting::shuffle)
      for (int i : named) threads[size_t(i)]->received = threads[size_t(first + threads[size_t(i)]->source)]->value;
    release(named);
    met = true;
  }
  return met;
}

// A barrier orders memory; a shuffle does not.
void Block::release(const std::vector<int>& met) {
  if (threads[size_t(met[0])]->meeting != Meeting::shuffle) {
    Clock joined = threads[size_t(met[0])]->clock;
    for (int i : met)
      for (size_t t = 0; t < joined.size(); ++t) joined[t] = std::max(joined[t], threads[size_t(i)]->clock[t]);
    for (int i : met) joined[size_t(i)] += 1;
    for (int i : met) threads[size_t(i)]->clock = joined;
  }
  for (int i : met) threads[size_t(i)]->meeting = Meeting::none;
}

void Block::report_deadlock() const {
  std::ostringstream text;
  text << "threads of block " << block_index << " wait for others that do not come:";
  std::string last;
  for (int i = 0; i < size(); ++i) {
    const Thread& thread = *threads[size_t(i)];
    const std::string state = thread.done ? "has left" : "waits at " + thread.site.text();
    if (state != last) text << " thread " << i << " " << state << ";";
    last = state;
  }
  throw Error(text.str());
}

}  // namespace simt
