#pragma once
#include "cuda_runtime.h"
#include "storage_types.h"

struct __half {
  unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return rk::emulated::to_float(rk::emulated::Half{x.bits}); }
inline __half __float2half_rn(float x) { return {rk::emulated::to_half(x).bits}; }
