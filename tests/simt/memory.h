#pragma once
// Global memory as emulated threads see it: addresses that only these functions can follow (any other access faults),
// and of each byte whether it belongs to a tensor, which thread wrote it, and what may be done with it.

#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Access : int32_t { input, output, sums };

class Memory {
 public:
  struct Buffer {
    std::string name;
    char* bytes;
    int64_t size;
    const uint8_t* belongs;  // [size], 1 where a byte belongs to the tensor
    Access access;
    uint64_t address;
    std::vector<int64_t> writer;  // of each byte; 0: nobody
  };

  // The address under which kernels know the buffer: not one that a processor follows.
  char* add(std::string name, void* bytes, int64_t size, const uint8_t* belongs, Access access) {
    const uint64_t address = FIRST_ADDRESS + (uint64_t(buffers.size()) << 40);
    buffers.push_back({name, static_cast<char*>(bytes), size, belongs, access, address, {}});
    if (access == Access::output) buffers.back().writer.resize(size_t(size));
    return reinterpret_cast<char*>(address);
  }

  template <typename T>
  T read(const T* from) {
    const Buffer& buffer = *access(from, sizeof(T), "reads");
    if (buffer.access != Access::input) throw Error("reads " + buffer.name + " as constant, which the kernel writes");
    T value;
    memcpy(&value, place(buffer, from), sizeof(T));
    return value;
  }

  template <typename T>
  void write(T* to, const T& value, int64_t thread) {
    Buffer& buffer = *access(to, sizeof(T), "writes");
    if (buffer.access != Access::output) throw Error("writes to " + buffer.name + ", which is no output");
    for (size_t i = 0; i < sizeof(T); ++i) {
      int64_t& writer = buffer.writer[size_t(place(buffer, to) - buffer.bytes) + i];
      if (writer != 0 && writer != thread) throw Error("writes to " + buffer.name + " what another thread wrote");
      writer = thread;
    }
    memcpy(place(buffer, to), &value, sizeof(T));
  }

  template <typename T>
  void add_to(T* to, const T* values, int64_t count) {
    Buffer& buffer = *access(to, size_t(count) * sizeof(T), "adds to");
    if (buffer.access != Access::sums) throw Error("adds to " + buffer.name + ", which is no sum");
    T* sums = reinterpret_cast<T*>(place(buffer, to));
    for (int64_t i = 0; i < count; ++i) sums[i] += values[i];
    reductions += 1;
  }

  void check_outputs_are_complete() const {
    for (const Buffer& buffer : buffers)
      for (size_t i = 0; i < buffer.writer.size(); ++i)
        if (buffer.belongs[i] && buffer.writer[i] == 0)
          throw Error("byte " + std::to_string(i) + " of " + buffer.name + " was never written");
  }

  int64_t reductions = 0;

 private:
  static constexpr uint64_t FIRST_ADDRESS = uint64_t(1) << 60;
  std::vector<Buffer> buffers;

  template <typename T>
  static char* place(const Buffer& buffer, const T* address) {
    return buffer.bytes + (reinterpret_cast<uint64_t>(address) - buffer.address);
  }

  Buffer* access(const void* at, size_t size, const char* verb) {
    const uint64_t address = reinterpret_cast<uint64_t>(at);
    for (Buffer& buffer : buffers) {
      const int64_t offset = int64_t(address - buffer.address);
      if (offset < -int64_t(1) << 38 || offset >= int64_t(1) << 38) continue;
      const std::string where = std::string(verb) + " " + std::to_string(size) + " bytes at byte " +
          std::to_string(offset) + " of " + buffer.name + " (" + std::to_string(buffer.size) + " bytes)";
      if (offset < 0 || offset + int64_t(size) > buffer.size) throw Error(where + ": out of bounds");
      if (address % size != 0) throw Error(where + ": misaligned");
      for (size_t i = 0; i < size; ++i)
        if (!buffer.belongs[size_t(offset) + i]) throw Error(where + ": between the rows of the tensor");
      return &buffer;
    }
    throw Error(std::string(verb) + " an address that is in no buffer");
  }
};

}  // namespace simt
