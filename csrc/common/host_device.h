#pragma once
// Macros for scalar formulas that both host and device compile, and for loops of the host that must be in one piece.

#define RK_INLINE __attribute__((always_inline))

#if defined(__CUDACC__)
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE inline RK_INLINE
#endif
