// Rows of the paged KV cache, gathered into contiguous K and V for attention kernels that know no pages.
#include "common.cuh"

namespace ember {

constexpr int kGatherThreads = 256;
constexpr int kGatherPieces = 4;  // 16-byte pieces of K and of V that a thread has in flight

__global__ void __launch_bounds__(kGatherThreads) gather_kv_kernel(uint4* k_out, uint4* v_out, const uint4* k_cache,
                                                                   const uint4* v_cache, const int64_t* slots,
                                                                   uint32_t pieces, uint32_t pieces_per_row) {
  wait_for_predecessor();
  let_successor_start();
  const uint32_t first = blockIdx.x * (kGatherThreads * kGatherPieces) + threadIdx.x;
  uint4 k[kGatherPieces], v[kGatherPieces];
#pragma unroll
  for (int i = 0; i < kGatherPieces; ++i) {
    const uint32_t piece = first + i * kGatherThreads;
    if (piece < pieces) {
      const uint32_t row = piece / pieces_per_row;
      const int64_t from = slots[row] * pieces_per_row + (piece - row * pieces_per_row);
      k[i] = k_cache[from];
      v[i] = v_cache[from];
    }
  }
#pragma unroll
  for (int i = 0; i < kGatherPieces; ++i) {
    const uint32_t piece = first + i * kGatherThreads;
    if (piece < pieces) {
      k_out[piece] = k[i];
      v_out[piece] = v[i];
    }
  }
}

}  // namespace ember

// k_out, v_out [count, row_bytes] = rows `slots` [count] of k_cache, v_cache [num_slots, row_bytes]; row_bytes is a
// multiple of 16 and all pointers are aligned to 16.
EMBER_API int ember_gather_kv(void* k_out, void* v_out, const void* k_cache, const void* v_cache, const int64_t* slots,
                              int64_t count, int64_t row_bytes, cudaStream_t stream) {
  using namespace ember;
  if (count <= 0) return 0;
  const int64_t pieces_per_row = row_bytes / 16, pieces = count * pieces_per_row;
  if (row_bytes % 16 != 0 || pieces >= (int64_t{1} << 32) - kGatherThreads * kGatherPieces)
    return fail("%lld rows of %lld bytes cannot be gathered", (long long)count, (long long)row_bytes);
  const int64_t blocks = (pieces + kGatherThreads * kGatherPieces - 1) / (kGatherThreads * kGatherPieces);
  return launch(gather_kv_kernel, dim3((unsigned)blocks), dim3(kGatherThreads), 0, stream, (uint4*)k_out,
                (uint4*)v_out, (const uint4*)k_cache, (const uint4*)v_cache, slots, (uint32_t)pieces,
                (uint32_t)pieces_per_row);
}
