#include "op.h"

#include "args.h"

namespace rk {

void query_similarity_relu(Tensor x, Tensor output) {
  QuerySimilarity a{};
  a.batch = x.size(0), a.queries = x.size(1), a.channels = x.size(2);
  a.x = view_of(x), a.output = view_of(output);
  a.parallel = torch_threads(a.batch * a.queries * a.queries * a.channels / (1 << 17));
  const Tensor scratch = workspace(RK_CALL_LEVEL(query_similarity_workspace, a));
  a.workspace = static_cast<char*>(scratch.data_ptr());
  RK_CALL_LEVEL(query_similarity_relu, a);
}

}  // namespace rk
