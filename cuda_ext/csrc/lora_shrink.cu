// down = x . A^T for the few rows of A that an adapter has: [tokens, K] times [ranks, K]^T, of up to about a thousand
// tokens. Nearly all of the work is to read x, so it is cut along K: a cluster of eight blocks takes 32 tokens, each of
// its 32 warps every 32nd piece of 32 values. Their sums are added in a fixed order through the cluster's shared memory,
// so a token's result depends neither on chance nor on the other tokens.
//
// Both operands go from global memory into the fragments of mma.m16n8k16. A thread's ranks along K are given to the
// eight adjacent values 8t..8t+7 (t = lane % 4): 16 bytes. A sum does not mind the order of its terms.
#include "hopper_host.cuh"
#include "low_rank.cuh"

namespace ember {

constexpr int kShrinkCluster = 8, kShrinkWarps = 4, kShrinkThreads = 32 * kShrinkWarps, kShrinkRows = 32;
constexpr int kShrinkPiece = 32;  // values along K

__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ float load_from_block(const float* shared, int block) {
  float value = 0.0f;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"((uint32_t)__cvta_generic_to_shared(shared)), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
  return value;
}

template <class T>
struct LoraShrink {
  const T* x;
  int64_t x_stride, tokens, depth;
  const T* a;  // [ranks, depth]
  int64_t ranks;
  T* down;  // [tokens, ranks]
};

// blockIdx.x: the block of a cluster; blockIdx.y: 32 tokens; blockIdx.z: kTiles * 8 ranks.
template <class T, int kTiles>
__global__ void __launch_bounds__(kShrinkThreads) lora_shrink_kernel(const LoraShrink<T> op) {
  constexpr int kColumns = kTiles * 8;
  __shared__ float sums[kShrinkWarps][kShrinkRows][kColumns + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, t = lane % 4;
  const int64_t row0 = (int64_t)blockIdx.y * kShrinkRows, column0 = (int64_t)blockIdx.z * kColumns;
  const int64_t pieces = op.depth / kShrinkPiece, slice = blockIdx.x * kShrinkWarps + warp;
  constexpr int64_t kSlices = kShrinkCluster * kShrinkWarps;

  struct Piece {
    Vector<T, 8> x[2][2], a[kTiles];
  } piece, next;
  const auto load_a = [&](Piece& to, int64_t index) {
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      const int64_t rank = column0 + i * 8 + group;
      to.a[i] = {};
      if (index < pieces && rank < op.ranks) to.a[i] = load_vector<8>(op.a + rank * op.depth + index * kShrinkPiece + t * 8);
    }
  };
  const auto load_x = [&](Piece& to, int64_t index) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = row0 + i * 16 + half * 8 + group;
        to.x[i][half] = {};
        if (index < pieces && row < op.tokens) {
          to.x[i][half] = load_vector<8>(op.x + row * op.x_stride + index * kShrinkPiece + t * 8);
        }
      }
    }
  };
  load_a(next, slice);  // A does not change while the model runs
  wait_for_predecessor();
  let_successor_start();
  load_x(next, slice);
  float sum[2][kTiles][4] = {};
  for (int64_t index = slice; index < pieces; index += kSlices) {
    piece = next;
    load_a(next, index + kSlices);
    load_x(next, index + kSlices);
#pragma unroll
    for (int step = 0; step < 2; step++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t left[4] = {piece.x[i][0].words[2 * step], piece.x[i][1].words[2 * step],
                                  piece.x[i][0].words[2 * step + 1], piece.x[i][1].words[2 * step + 1]};
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
          multiply_add(sum[i][j], left, piece.a[j].words[2 * step], piece.a[j].words[2 * step + 1], T{});
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int k = 0; k < 4; k++) sums[warp][i * 16 + k / 2 * 8 + group][j * 8 + t * 2 + k % 2] = sum[i][j][k];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kShrinkRows * kColumns; i += kShrinkThreads) {
    const int row = i / kColumns, column = i % kColumns;
    float total = sums[0][row][column];
#pragma unroll
    for (int w = 1; w < kShrinkWarps; w++) total += sums[w][row][column];
    sums[0][row][column] = total;
  }
  cluster_barrier();
  constexpr int kOwnRows = kShrinkRows / kShrinkCluster;  // each block writes a part of the tokens
  for (int i = threadIdx.x; i < kOwnRows * kColumns; i += kShrinkThreads) {
    const int row = blockIdx.x * kOwnRows + i / kColumns, column = i % kColumns;
    float total = 0.0f;
#pragma unroll
    for (int block = 0; block < kShrinkCluster; block++) total += load_from_block(&sums[0][row][column], block);
    if (row0 + row < op.tokens && column0 + column < op.ranks) {
      op.down[(row0 + row) * op.ranks + column0 + column] = from_float<T>(total);
    }
  }
  cluster_barrier();  // others read this block's memory
}

template <class T, int kTiles>
int launch_lora_shrink(const LoraShrink<T>& op, cudaStream_t stream) {
  const dim3 grid(kShrinkCluster, (unsigned)ceil_div(op.tokens, kShrinkRows), (unsigned)ceil_div(op.ranks, kTiles * 8));
  return launch_clusters(kShrinkCluster, lora_shrink_kernel<T, kTiles>, grid, dim3(kShrinkThreads), 0, stream, op);
}

}  // namespace ember

// x: [tokens, depth] with `stride` elements between rows, a: [ranks, depth], down: [tokens, ranks]; depth is a multiple
// of 32, rows of x and a are whole 16-byte pieces. It needs compute capability 9.0.
EMBER_API int ember_lora_shrink(const void* x, int64_t stride, int64_t tokens, int64_t depth, const void* a,
                                int64_t ranks, void* down, int64_t dtype, cudaStream_t stream) {
  using namespace ember;
  EMBER_DISPATCH(dtype, {
    if constexpr (sizeof(scalar) == 2) {
      const LoraShrink<scalar> op = {(const scalar*)x, stride, tokens, depth, (const scalar*)a, ranks, (scalar*)down};
      if (depth % kShrinkPiece != 0 || !aligned(op.x, stride) || !aligned(op.a, depth)) {
        return fail("rows of x and A must be whole 16-byte pieces and their length a multiple of %d", kShrinkPiece);
      }
      if (ranks > 32) return launch_lora_shrink<scalar, 6>(op, stream);
      if (ranks > 16) return launch_lora_shrink<scalar, 4>(op, stream);
      return launch_lora_shrink<scalar, 2>(op, stream);
    } else {
      return fail("only 16-bit types are possible");
    }
  })
  return 0;
}
