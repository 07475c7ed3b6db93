#pragma once
// Each op's cpu.cpp is compiled once a SIMD level, into a namespace of the level's name; run time picks the level.

#include <stdint.h>

namespace rk {

enum class SimdLevel { baseline, avx2, avx512 };

// The best level that this machine and the build have; ROUTE_KERNELS_SIMD=baseline|avx2|avx512 lowers it.
SimdLevel simd_level();
const char* simd_level_name();

}  // namespace rk

// Declares `void name(const Args&)` and `int64_t name_workspace(const Args&)`, the bytes of scratch memory that it
// takes, in the namespace of each level; to be used in an op's namespace, which has Args.
#define RK_DECLARE_AT_LEVEL(level, name) \
  namespace level {                      \
  int64_t name##_workspace(const Args&); \
  void name(const Args&);                \
  }

#if defined(__x86_64__) || defined(_M_X64)
#define RK_DECLARE_KERNEL(name)       \
  RK_DECLARE_AT_LEVEL(baseline, name) \
  RK_DECLARE_AT_LEVEL(avx2, name)     \
  RK_DECLARE_AT_LEVEL(avx512, name)
// The function of the machine's level.
#define RK_OF_LEVEL(name)                                           \
  (::rk::simd_level() == ::rk::SimdLevel::avx512     ? avx512::name \
       : ::rk::simd_level() == ::rk::SimdLevel::avx2 ? avx2::name   \
                                                     : baseline::name)
#else
#define RK_DECLARE_KERNEL(name) RK_DECLARE_AT_LEVEL(baseline, name)
#define RK_OF_LEVEL(name) (baseline::name)
#endif
