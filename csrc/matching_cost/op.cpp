#include "../common/stable_tensor.h"
#include "args.h"

namespace rk::matching_cost {

void forward(
    const Tensor& logits, const MaybeTensor& lse, const Tensor& boxes, const Tensor& true_boxes, const Tensor& labels,
    const Ints& counts, const Numbers& scalars, const Tensor& output) {
  Args a{};
  a.B = logits.size(0), a.G = logits.size(1), a.N = logits.size(2), a.K = logits.size(3);
  a.class_weight = scalars[0], a.l1_weight = scalars[1], a.giou_weight = scalars[2];
  a.alpha = scalars[3], a.gamma = scalars[4];
  a.logits = view_of(logits), a.lse = view_of(lse), a.boxes = view_of(boxes), a.output = view_of(output);
  a.true_boxes = true_boxes.data_ptr();
  a.labels = static_cast<const int64_t*>(labels.data_ptr());
  a.counts = counts.data();
  for (const int64_t count : counts) a.most = std::max(a.most, count);
  a.parallel = torch_threads(labels.size(0) * a.G * a.N / (1 << 14));
  RK_RUN(forward, a);
}

STABLE_TORCH_LIBRARY_IMPL(route_kernels_native, CPU, m) { m.impl("matching_cost_forward", TORCH_BOX(&forward)); }

}  // namespace rk::matching_cost
