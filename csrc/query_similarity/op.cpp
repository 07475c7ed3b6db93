#include "../common/stable_tensor.h"
#include "args.h"

namespace rk::query_similarity {

void forward(const Tensor& x, const Tensor& output) {
  Args a{};
  a.batch = x.size(0), a.queries = x.size(1), a.channels = x.size(2);
  a.x = view_of(x), a.output = view_of(output);
  a.parallel = torch_threads(a.batch * a.queries * a.queries * a.channels / (1 << 17));
  RK_RUN(forward, a);
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) { m.impl("query_similarity_forward", TORCH_BOX(&forward)); }

}  // namespace rk::query_similarity
