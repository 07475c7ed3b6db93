#pragma once
// The CUDA kernels of multi-scale deformable attention; no ATen, no host code. They compile with plain nvcc, and with a
// host compiler over an emulation of CUDA's threads.

#include "backward.cuh"
#include "forward.cuh"
#include "gather.cuh"
