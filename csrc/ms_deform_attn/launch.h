#pragma once
// The launches of the CUDA kernels as host code sees them: no CUDA header is needed to call them. launch.cuh defines
// them; cuda.cu is compiled once a storage type (of value) and instantiates one each.

#include "device_args.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace rk::ms_deform_attn {

// Each enqueues at most one kernel on the stream of the current device, allocates nothing and waits for nothing. It
// returns a cudaError_t: 0, or why the launch was refused. Where there is nothing to write there is no launch.
template <DType STORAGE>
int launch_forward(const DeviceArgs& args, CUstream_st* stream);

template <DType STORAGE>
int launch_backward(const DeviceArgs& args, CUstream_st* stream);

template <DType STORAGE>
int launch_gather(const DeviceArgs& args, CUstream_st* stream);  // after a deterministic backward

}  // namespace rk::ms_deform_attn
