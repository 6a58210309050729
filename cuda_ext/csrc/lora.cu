// y[:, rows of a part] (+)= scale * down[:, ranks of the part] . B^T, for all parts of a fused linear in one launch.
#include "low_rank.cuh"

namespace ember {

template <class T>
struct LoraExpand {
  T* y;  // [tokens, out]
  int64_t y_stride, tokens;
  const T* down;  // [tokens, sum of ranks]
  int64_t down_stride;
  int64_t chunk;  // rows a block takes
  bool add;       // to what is in y; else that is not read
  LoraPart parts[kMaxLoraParts];
};

// blockIdx.x: a tile of columns of one part; blockIdx.y: a chunk of tokens.
template <class T, int kUnits, int kSteps, bool kWhole>
__global__ void __launch_bounds__(kLowRankThreads, kLowRankBlocks) lora_expand_kernel(const LoraExpand<T> op) {
  using Tile = LowRankTile<T, kUnits, kSteps, false, kWhole>;
  extern __shared__ __align__(16) unsigned char shared[];
  int64_t tile_index = blockIdx.x;
  LoraPart part = op.parts[0];
#pragma unroll
  for (int i = 1; i < kMaxLoraParts; i++) {
    const int64_t tiles = ceil_div(part.rows, Tile::kColumns);
    if (tile_index < tiles) break;
    tile_index -= tiles;
    part = op.parts[i];
  }
  LowRank<T> low_rank;
  low_rank.out = op.y + part.first_row;
  low_rank.in = op.add ? low_rank.out : nullptr;
  low_rank.in_stride = low_rank.out_stride = op.y_stride;
  low_rank.left = op.down + part.first_rank;
  low_rank.left_stride = op.down_stride;
  low_rank.right = (const T*)part.b;
  low_rank.right_stride = part.rank;
  low_rank.rows = op.tokens;
  low_rank.columns = part.rows;
  low_rank.rank = (int)part.rank;
  low_rank.scale = (float)part.scale;
  low_rank.right_whole = aligned(low_rank.right, part.rank);
  low_rank.left_fours = aligned(low_rank.left, op.down_stride, 4 * sizeof(T)) && part.rank % 4 == 0;
  const Tile tile{low_rank, shared, tile_index * Tile::kColumns};
  const int64_t first = blockIdx.y * op.chunk, end = first + op.chunk, last = end < op.tokens ? end : op.tokens;
  tile.stage();  // B does not change while the model runs
  wait_for_predecessor();
  let_successor_start();
  tile.begin(first, last);
  tile.walk(first, last);
}

template <class T, int kUnits, int kSteps, bool kWhole>
int launch_lora_expand(LoraExpand<T> op, int max_rank, cudaStream_t stream) {
  using Tile = LowRankTile<T, kUnits, kSteps, false, kWhole>;
  const auto kernel = lora_expand_kernel<T, kUnits, kSteps, kWhole>;
  int64_t tiles = 0;
  for (const LoraPart& part : op.parts) tiles += ceil_div(part.rows, Tile::kColumns);
  op.chunk = low_rank_chunk(op.tokens, tiles, Tile::kRows, Tile::shared_bytes(max_rank));
  const dim3 grid((unsigned)tiles, (unsigned)ceil_div(op.tokens, op.chunk));
  return launch(kernel, grid, dim3(kLowRankThreads), Tile::shared_bytes(max_rank), stream, op);
}

}  // namespace ember

// Strides in elements; parts is read before this returns.
EMBER_API int ember_lora_expand(void* y, int64_t y_stride, int64_t tokens, const void* down, int64_t down_stride,
                                const ember::LoraPart* parts, int64_t num_parts, int64_t add, int64_t dtype,
                                cudaStream_t stream) {
  using namespace ember;
  int max_rank = 0;
  if (num_parts > kMaxLoraParts) return fail("%lld parts, at most %d are possible", (long long)num_parts, kMaxLoraParts);
  for (int64_t i = 0; i < num_parts; i++) max_rank = parts[i].rank > max_rank ? (int)parts[i].rank : max_rank;
  if (max_rank > kMaxRank) return fail("rank %d, at most %d is possible", max_rank, kMaxRank);
  EMBER_DISPATCH(dtype, {
    LoraExpand<scalar> op = {(scalar*)y, y_stride, tokens, (const scalar*)down, down_stride, 0, add != 0, {}};
    for (int64_t i = 0; i < num_parts; i++) op.parts[i] = parts[i];
    bool whole = aligned(op.y, y_stride);
    for (const LoraPart& part : op.parts) {
      whole = whole && aligned(op.y + part.first_row, part.rows);
    }
    if (!whole) return launch_lora_expand<scalar, 1, 1, false>(op, max_rank, stream);
    if constexpr (sizeof(scalar) == 2) {
      // Few rows want many blocks; of a high rank only a narrow tile fits into shared memory.
      if (tokens > 64 && max_rank <= 16) return launch_lora_expand<scalar, 2, 1, true>(op, max_rank, stream);
      if (tokens > 64 && max_rank <= 64) return launch_lora_expand<scalar, 2, 4, true>(op, max_rank, stream);
      if (max_rank > 16) return launch_lora_expand<scalar, 1, 4, true>(op, max_rank, stream);
    }
    return launch_lora_expand<scalar, 1, 1, true>(op, max_rank, stream);
  })
  return 0;
}
