#pragma once
// Which query and head a group of lanes works on. A block takes neighbouring queries of one head, so that their gathers
// meet in the cache; the heads of the same queries follow each other. Where the queries are the positions of the levels
// (an encoder), neighbours are tiles of pixels, else runs of queries.

#include "device_args.h"

namespace rk::ms_deform_attn {

struct WorkOrder {
  uint32_t tiles;                   // of a batch element and head
  int32_t tile_height, tile_width;  // their product is the number of queries of a block
  bool queries_are_positions;
};

struct Work {
  int64_t b, n;
  int32_t h;
  bool exists;
};

__device__ __forceinline__ Work work_of(const DeviceArgs& args, const WorkOrder& order, int32_t query_of_block) {
  const uint32_t block = blockIdx.x, heads = uint32_t(args.H), of_heads = block / heads, b = of_heads / order.tiles;
  uint32_t tile = of_heads - b * order.tiles;
  Work work;
  work.b = b, work.h = int32_t(block - of_heads * heads);
  if (!order.queries_are_positions) {
    work.n = int64_t(tile) * order.tile_width + query_of_block;
    work.exists = work.n < args.N;
    return work;
  }
  int64_t before = 0;
  for (int32_t l = 0; l < args.L; ++l) {
    const int32_t height = args.levels[l].height, width = args.levels[l].width;
    const uint32_t across = uint32_t(width + order.tile_width - 1) / order.tile_width;
    const uint32_t tiles = across * (uint32_t(height + order.tile_height - 1) / order.tile_height);
    if (tile < tiles) {
      const int32_t row = int32_t(tile / across) * order.tile_height + query_of_block / order.tile_width;
      const int32_t column = int32_t(tile % across) * order.tile_width + query_of_block % order.tile_width;
      work.n = before + int64_t(row) * width + column;
      work.exists = row < height && column < width;
      return work;
    }
    tile -= tiles;
    before += int64_t(height) * width;
  }
  work.exists = false;
  work.n = 0;
  return work;
}

}  // namespace rk::ms_deform_attn
