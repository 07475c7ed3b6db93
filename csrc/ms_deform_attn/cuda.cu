// The kernels that store RK_STORAGE; the build compiles this file once for each storage type.

#include "launch.cuh"

#ifndef RK_STORAGE
#error "RK_STORAGE names the dtype of value: float64, float32, float16 or bfloat16"
#endif

namespace rk::ms_deform_attn {

template int launch_forward<DType::RK_STORAGE>(const DeviceArgs&, CUstream_st*);
template int launch_backward<DType::RK_STORAGE>(const DeviceArgs&, CUstream_st*);
template int launch_gather<DType::RK_STORAGE>(const DeviceArgs&, CUstream_st*);

}  // namespace rk::ms_deform_attn
