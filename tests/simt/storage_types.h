#pragma once
// float16 and bfloat16 of the CPU kernels, whose rounding has tests of its own.
#define RK_SIMD emulated
#include "../../csrc/common/simd.h"
