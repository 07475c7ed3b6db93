#pragma once
#include "cuda_runtime.h"

using cudaStream_t = CUstream_st*;
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
