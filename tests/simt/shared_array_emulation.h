#pragma once
#include "block.h"

namespace rk {

template <typename T>
class SharedArray {
 public:
  T read(int index) const {
    T value;
    simt::Block::current().read_shared(int64_t(index) * int64_t(sizeof(T)), &value, sizeof(T));
    return value;
  }
  void write(int index, T value) {
    simt::Block::current().write_shared(int64_t(index) * int64_t(sizeof(T)), &value, sizeof(T));
  }
};

}  // namespace rk
