#include "dispatch.h"

#include <stdlib.h>

#include <stdexcept>
#include <string>

namespace rk {
namespace {

SimdLevel best_of_machine() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? SimdLevel::avx512 : avx2 ? SimdLevel::avx2 : SimdLevel::baseline;
#else
  return SimdLevel::baseline;
#endif
}

SimdLevel choose() {
  const SimdLevel best = best_of_machine();
  const char* wanted = getenv("ROUTE_KERNELS_SIMD");
  if (wanted == nullptr) return best;
  const std::string name(wanted);
  const SimdLevel levels[] = {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512};
  const char* const names[] = {"baseline", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i) {
    if (name == names[i]) {
      if (levels[i] > best) throw std::runtime_error("ROUTE_KERNELS_SIMD=" + name + ": this machine does not have it");
      return levels[i];
    }
  }
  throw std::runtime_error("ROUTE_KERNELS_SIMD: expected baseline, avx2 or avx512, got '" + name + "'");
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = choose();
  return level;
}

const char* simd_level_name() {
#if defined(__aarch64__)
  return "neon";
#else
  switch (simd_level()) {
    case SimdLevel::avx512: return "avx512";
    case SimdLevel::avx2: return "avx2";
    default: return "baseline";
  }
#endif
}

}  // namespace rk
