// live = golden + scale * B . A, for all parts of a fused weight in one launch; rows without a part are copied.
#include "low_rank.cuh"

namespace ember {

// Rows of the weight that share a part, or that have none (rank 0).
struct RebuildSegment {
  const void* b;
  int64_t first_row, rows, first_rank, chunks;
  int rank;
  float scale;
};
constexpr int kMaxSegments = 2 * kMaxLoraParts + 1;

template <class T>
struct Rebuild {
  T* live;
  const T* golden;  // both [rows, columns]
  int64_t columns;
  const T* a;  // [sum of ranks, columns]
  int64_t chunk;  // rows a block takes
  bool more;      // another rebuild is the next kernel of the stream
  bool after;     // a rebuild with more is the last kernel before it
  RebuildSegment segments[kMaxSegments];
};

// blockIdx.x: a tile of columns; blockIdx.y: a chunk of rows of one segment.
template <class T, int kUnits, int kSteps, bool kWhole>
__global__ void __launch_bounds__(kLowRankThreads, kLowRankBlocks) rebuild_kernel(const Rebuild<T> op) {
  using Tile = LowRankTile<T, kUnits, kSteps, true, kWhole>;
  extern __shared__ __align__(16) unsigned char shared[];
  int64_t chunk_index = blockIdx.y;
  RebuildSegment segment = op.segments[0];
#pragma unroll
  for (int i = 1; i < kMaxSegments; i++) {
    if (chunk_index < segment.chunks) break;
    chunk_index -= segment.chunks;
    segment = op.segments[i];
  }
  LowRank<T> low_rank;
  low_rank.in = op.golden + segment.first_row * op.columns;
  low_rank.out = op.live + segment.first_row * op.columns;
  low_rank.in_stride = low_rank.out_stride = low_rank.right_stride = low_rank.columns = op.columns;
  low_rank.left = (const T*)segment.b;
  low_rank.left_stride = low_rank.rank = segment.rank;
  low_rank.right = op.a + segment.first_rank * op.columns;
  low_rank.rows = segment.rows;
  low_rank.scale = segment.scale;
  low_rank.right_whole = aligned(op.a, op.columns);
  low_rank.left_fours = aligned(low_rank.left, segment.rank, 4 * sizeof(T));
  const Tile tile{low_rank, shared, (int64_t)blockIdx.x * Tile::kColumns};
  const int64_t first = chunk_index * op.chunk, end = first + op.chunk, last = end < segment.rows ? end : segment.rows;
  tile.begin(first, last);  // golden is never written
  // A rebuild lets the next one start when what was before the first of them has ended, since that is when this one
  // starts. They touch no memory in common, so nothing else is waited for; but none ends before the one before it, so
  // that whoever waits for the last one has waited for all. Other kernels may read weights before they wait: they may
  // not start early.
  if (!op.after) wait_for_predecessor();
  if (op.more) let_successor_start();
  tile.stage();
  tile.walk(first, last);
  if (op.after) wait_for_predecessor();
}

template <class T, int kUnits, int kSteps, bool kWhole>
int launch_rebuild(Rebuild<T> op, int64_t rows, int max_rank, cudaStream_t stream) {
  using Tile = LowRankTile<T, kUnits, kSteps, true, kWhole>;
  const auto kernel = rebuild_kernel<T, kUnits, kSteps, kWhole>;
  const int64_t tiles = ceil_div(op.columns, Tile::kColumns);
  int64_t chunks = 0;
  op.chunk = low_rank_chunk(rows, tiles, Tile::kRows, Tile::shared_bytes(max_rank));
  for (RebuildSegment& segment : op.segments) chunks += segment.chunks = ceil_div(segment.rows, op.chunk);
  const dim3 grid((unsigned)tiles, (unsigned)chunks);
  return launch(kernel, grid, dim3(kLowRankThreads), Tile::shared_bytes(max_rank), stream, op);
}

}  // namespace ember

// live and golden must not overlap. more: the next kernel of the stream is a rebuild as well, of another weight; after:
// the last one was a rebuild with more. The parts stand in the order of their rows; they are read before this returns.
EMBER_API int ember_rebuild_weight(void* live, const void* golden, int64_t rows, int64_t columns, const void* a,
                                   const ember::LoraPart* parts, int64_t num_parts, int64_t more, int64_t after,
                                   int64_t dtype, cudaStream_t stream) {
  using namespace ember;
  if (num_parts > kMaxLoraParts) return fail("%lld parts, at most %d are possible", (long long)num_parts, kMaxLoraParts);
  RebuildSegment segments[kMaxSegments] = {};
  int64_t row = 0;
  int max_rank = 0, count = 0;
  for (int64_t i = 0; i < num_parts; i++) {
    const LoraPart& part = parts[i];
    if (part.rank > kMaxRank) return fail("rank %lld, at most %d is possible", (long long)part.rank, kMaxRank);
    if (part.first_row < row) return fail("part %lld begins inside the part before it", (long long)i);
    if (part.first_row > row) segments[count++] = {nullptr, row, part.first_row - row, 0, 0, 0, 0.0f};
    segments[count++] = {part.b, part.first_row, part.rows, part.first_rank, 0, (int)part.rank, (float)part.scale};
    row = part.first_row + part.rows;
    max_rank = part.rank > max_rank ? (int)part.rank : max_rank;
  }
  if (row < rows) segments[count++] = {nullptr, row, rows - row, 0, 0, 0, 0.0f};
  EMBER_DISPATCH(dtype, {
    Rebuild<scalar> op = {(scalar*)live, (const scalar*)golden, columns, (const scalar*)a, 0, more != 0, after != 0, {}};
    for (int i = 0; i < count; i++) op.segments[i] = segments[i];
    const bool whole = aligned(op.live, columns) && aligned(op.golden, columns);
    if (!whole) return launch_rebuild<scalar, 1, 1, false>(op, rows, max_rank, stream);
    if constexpr (sizeof(scalar) == 2) {
      if (max_rank <= 16) return launch_rebuild<scalar, 2, 1, true>(op, rows, max_rank, stream);
      if (max_rank <= 64) return launch_rebuild<scalar, 2, 4, true>(op, rows, max_rank, stream);
    }
    return launch_rebuild<scalar, 1, 4, true>(op, rows, max_rank, stream);  // only a narrow tile fits
  })
  return 0;
}
