#pragma once
#include "cuda_runtime.h"
#include "storage_types.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {rk::emulated::to_bfloat16(x).bits}; }
