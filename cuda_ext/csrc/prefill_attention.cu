// Causal attention of packed chunks over the paged KV cache on Hopper's matrix units, bfloat16 and float16.
//
// After FlashAttention-3 (Shah et al. 2024): some warps copy tiles of K and V into rings in shared memory, two
// warpgroups of 64 query rows each run S = Q K^T and O += P V. Inside a warpgroup the products of the next tile run
// under the softmax of this one, from one item of work to the next as inside one; between them the two take turns, so
// that one multiplies while the other exponentiates.
#include "hopper_host.cuh"
#include "prefill_attention_compute.cuh"

namespace ember::prefill {

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) prefill_attention_kernel(const __grid_constant__ Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  auto& shared = *(Shared<D>*)((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    barrier_init(&shared.q_empty, 8);
    for (int i = 0; i < kStagesK; ++i) {
      barrier_init(&shared.k_full[i], 1);
      barrier_init(&shared.k_empty[i], 8);
    }
    for (int i = 0; i < kStagesV; ++i) {
      barrier_init(&shared.v_full[i], 1);
      barrier_init(&shared.v_empty[i], 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();
  let_successor_start();
  if (threadIdx.x < 128) {
    shrink_registers<40>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp < 2)
      produce<D, false>(params, shared, shared.k, shared.k_full, shared.k_empty, params.k_map,
                                 params.k_row_map, warp);
    else
      produce<D, true>(params, shared, shared.v, shared.v_full, shared.v_empty, params.v_map,
                                params.v_row_map, warp - 2);
  } else {
    grow_registers<232>();
    consume<T, D>(params, shared);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // the library was built without sm_90a
#endif
}

namespace {

template <class T, int D>
int run(const Params& params, cudaStream_t stream) {
  const int blocks = min(device_info().multiprocessors, params.num_tiles * params.heads);
  return launch(prefill_attention_kernel<T, D>, dim3(blocks), dim3(kThreads), sizeof(Shared<D>) + 1024, stream, params);
}

}  // namespace
}  // namespace ember::prefill

// out, q [tokens, heads, head_dim]; k, v [rows, kv_heads, head_dim]; all contiguous. Each of `tiles` [num_tiles, 4]
// int32 is at most 128 consecutive queries of a chunk: first packed query, queries, position of the first, packed
// position at which the chunk's sequence starts; the longest first. With slots [sum of k_lens], packed position i is
// row slots[i] of k and v, and whole runs of `run` positions from a multiple of it lie in consecutive rows; without, it
// is row i.
EMBER_API int ember_prefill_attention(void* out, const void* q, const void* k, const void* v, const int64_t* slots,
                                      const int32_t* tiles, int64_t num_tiles, int64_t tokens, int64_t num_rows,
                                      int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t run_length,
                                      int64_t dtype, float scale, cudaStream_t stream) {
  using namespace ember;
  using namespace ember::prefill;
  if (device_info().major != 9) return fail("prefill attention's kernel runs on compute capability 9.0 only");
  if (head_dim != 64 && head_dim != 128) return fail("head_dim is %lld, not 64 or 128", (long long)head_dim);
  if (dtype != kBFloat16 && dtype != kFloat16) return fail("q is neither bfloat16 nor float16");
  if (!(scale > 0)) return fail("scale is %g; it must be positive", (double)scale);
  if (tensor_map_encoder() == nullptr) return fail("the driver knows no tensor maps; it must be of CUDA 12.0 or newer");
  if (slots != nullptr && run_length < kShortestRun)
    return fail("K and V in runs of %lld are to be gathered first", (long long)run_length);
  if (num_tiles == 0) return 0;
  const int box = slots == nullptr ? kTileK / 2 : min((int)run_length, kTileK / 2);  // a warp copies half a tile
  Params params;
  const auto describe_rows = [&](CUtensorMap* map, const void* data, int64_t rows, int64_t heads, int box_rows) {
    return describe(map, data, dtype, {head_dim, heads, rows}, {head_dim, head_dim * heads}, {kColumns, 1, box_rows});
  };
  if (!describe_rows(&params.q_map, q, tokens, heads, kTileQ) ||
      !describe_rows(&params.k_map, k, num_rows, kv_heads, box) ||
      !describe_rows(&params.v_map, v, num_rows, kv_heads, box) ||
      !describe_rows(&params.k_row_map, k, num_rows, kv_heads, 1) ||
      !describe_rows(&params.v_row_map, v, num_rows, kv_heads, 1))
    return fail("q, k or v cannot be described to the copy engine: is each aligned to 16 bytes?");
  params.out = out;
  params.tiles = (const int4*)tiles;
  params.slots = slots;
  params.num_tiles = (int)num_tiles;
  params.heads = (int)heads;
  params.group = (int)(heads / kv_heads);
  params.run = box;
  params.scale_log2 = scale * 1.4426950408889634f;
  if (dtype == kBFloat16) return head_dim == 128 ? run<bf16, 128>(params, stream) : run<bf16, 64>(params, stream);
  return head_dim == 128 ? run<fp16, 128>(params, stream) : run<fp16, 64>(params, stream);
}
