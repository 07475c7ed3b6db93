#pragma once
// Shared memory of an emulated block. Every access is checked: bounds, alignment, whether the byte was ever written,
// and whether a barrier orders it after the other threads' accesses (vector clocks: a thread knows how far each other
// thread had come when a barrier last joined them).

#include <stdint.h>
#include <string.h>

#include <utility>
#include <vector>

#include "memory.h"

namespace simt {

using Clock = std::vector<int64_t>;  // of each thread of the block, how far it is known to have come

class SharedMemory {
 public:
  explicit SharedMemory(int64_t size) : bytes(size_t(size)) {}

  void read(int64_t at, void* to, int64_t size, int64_t alignment, int thread, const Clock& clock) {
    check_place("reads", at, size, alignment);
    for (int64_t i = 0; i < size; ++i) {
      Byte& byte = bytes[size_t(at + i)];
      if (byte.writer < 0) throw Error("reads shared memory at byte " + std::to_string(at + i) + ", never written");
      if (!is_before(byte.writer, byte.written_at, thread, clock)) throw race("reads", byte.writer, "wrote");
      byte.readers.push_back({thread, clock[size_t(thread)]});
      static_cast<uint8_t*>(to)[i] = byte.value;
    }
  }

  void write(int64_t at, const void* from, int64_t size, int64_t alignment, int thread, const Clock& clock) {
    check_place("writes", at, size, alignment);
    for (int64_t i = 0; i < size; ++i) {
      Byte& byte = bytes[size_t(at + i)];
      if (byte.writer >= 0 && !is_before(byte.writer, byte.written_at, thread, clock))
        throw race("writes", byte.writer, "wrote");
      for (const auto& reader : byte.readers)
        if (!is_before(reader.first, reader.second, thread, clock)) throw race("writes", reader.first, "read");
      byte = {static_cast<const uint8_t*>(from)[i], thread, clock[size_t(thread)], {}};
    }
  }

 private:
  struct Byte {
    uint8_t value = 0xFF;
    int writer = -1;
    int64_t written_at = 0;
    std::vector<std::pair<int, int64_t>> readers;
  };
  std::vector<Byte> bytes;

  static bool is_before(int other, int64_t time, int thread, const Clock& clock) {
    return other == thread || clock[size_t(other)] > time;
  }

  static Error race(const char* verb, int other, const char* other_verb) {
    return Error(
        std::string(verb) + " shared memory that thread " + std::to_string(other) + " " + other_verb +
        " with no barrier since");
  }

  void check_place(const char* verb, int64_t at, int64_t size, int64_t alignment) const {
    if (at < 0 || at + size > int64_t(bytes.size()))
      throw Error(
          std::string(verb) + " shared memory at byte " + std::to_string(at) + " of " + std::to_string(bytes.size()));
    if (at % alignment != 0)
      throw Error(std::string(verb) + " shared memory at a misaligned byte " + std::to_string(at));
  }
};

}  // namespace simt
