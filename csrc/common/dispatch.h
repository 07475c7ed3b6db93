#pragma once
// Each op's cpu.cpp is compiled once a SIMD level, into a namespace of the level's name; run time picks the level.

namespace rk {

enum class SimdLevel { baseline, avx2, avx512 };

// The best level that this machine and the build have; ROUTE_KERNELS_SIMD=baseline|avx2|avx512 lowers it.
SimdLevel simd_level();
const char* simd_level_name();

}  // namespace rk

#if defined(__x86_64__) || defined(_M_X64)
#define RK_DECLARE_LEVELS(result, name, ...)       \
  namespace baseline { result name(__VA_ARGS__); } \
  namespace avx2 { result name(__VA_ARGS__); }     \
  namespace avx512 { result name(__VA_ARGS__); }
#define RK_CALL_LEVEL(name, ...)                                                      \
  (::rk::simd_level() == ::rk::SimdLevel::avx512                                      \
       ? ::rk::avx512::name(__VA_ARGS__)                                              \
       : (::rk::simd_level() == ::rk::SimdLevel::avx2 ? ::rk::avx2::name(__VA_ARGS__) \
                                                      : ::rk::baseline::name(__VA_ARGS__)))
#else
#define RK_DECLARE_LEVELS(result, name, ...) \
  namespace baseline { result name(__VA_ARGS__); }
#define RK_CALL_LEVEL(name, ...) ::rk::baseline::name(__VA_ARGS__)
#endif
