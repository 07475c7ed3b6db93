#pragma once
#include "block.h"

namespace rk {

template <typename T>
T read_shared(int at) {
  T value;
  simt::Block::current().read_shared(at, &value, sizeof(T), alignof(T));
  return value;
}

template <typename T>
void write_shared(int at, const T& value) {
  simt::Block::current().write_shared(at, &value, sizeof(T), alignof(T));
}

}  // namespace rk
