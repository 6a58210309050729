// Group decode attention, second kernel: the last piece of each row's suffix, and the merge of all partial results.
//
// A warp takes one row and one KV head; its up to 8 query heads are rows of one tensor-core tile. It has its own
// pipeline of cp.async copies, so nothing but its own latency holds it up. It may run beside the end of the split
// kernel: only the merge waits for that. The merge goes through the partial results in order, the own piece last.
#include "decode_attention.cuh"

namespace ember::decode {
namespace {

constexpr int kWarps = 4, kStageTokens = 16;
constexpr float kLowest = -1e30f;  // below every log of a sum; finite, so that differences are

template <int D>
constexpr int kStageBytes = 2 * kStageTokens* kRowBytes<D>;  // K, then V

template <class T, int D, int STAGES>
__global__ void __launch_bounds__(32 * kWarps) finish_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
  const int row = (blockIdx.x * kWarps + warp) / p.kv_heads, head = (blockIdx.x * kWarps + warp) % p.kv_heads;
  const int share = p.heads / p.kv_heads;
  char* const stages = shared + warp * STAGES * kStageBytes<D>;
  let_successor_start();
  // Safe before wait_for_predecessor(): the split kernel lets this one start only after its own predecessors, which
  // wrote what is read here, have ended.
  const int group = row < p.rows ? __ldg(p.row_group + row) : -1;
  const int length = row < p.rows ? __ldcg(p.suffix_lens + row) : 0;
  T* const out = static_cast<T*>(p.out) + ((int64_t)row * p.heads + head * share) * D;
  if (group < 0 || length <= 0) {
    wait_for_predecessor();
    if (row < p.rows)
      for (int i = lane; i < share * D / 8; i += 32) reinterpret_cast<uint4*>(out)[i] = make_uint4(0, 0, 0, 0);
    return;
  }
  const int block_shift = __ffs(p.block_size) - 1;
  const int own_pieces = (length - 1) / p.split_tokens;  // before the last one
  const int begin = own_pieces * p.split_tokens, tokens = length - begin;
  const int* const block_table = p.suffix_blocks + __ldg(p.suffix_starts + row) + (begin >> block_shift);
  const int num_blocks = (tokens + p.block_size - 1) >> block_shift, num_stages = (tokens + 15) / kStageTokens;
  const int partials = (__ldg(p.prefix_lens + group) + p.split_tokens - 1) / p.split_tokens + own_pieces;
  const int64_t first_partial = (int64_t)__ldg(p.partial_starts + row) * p.heads + head * share;
  int blocks = lane < num_blocks ? __ldg(block_table + lane) : 0;

  const uint64_t policy = evict_first_policy();
  auto copy_stage = [&](int stage) {
    if (stage < num_stages) {
      const int token = stage * kStageTokens, block = token >> block_shift;
      if (block > 0 && block % 32 == 0 && block << block_shift == token)
        blocks = block + lane < num_blocks ? __ldg(block_table + block + lane) : 0;
      const int64_t number = __shfl_sync(~0u, blocks, block % 32);
      const int64_t slot = (number << block_shift) + (token & (p.block_size - 1));
      const uint32_t target = shared_address(stages + stage % STAGES * kStageBytes<D>);
      constexpr int kChunks = D / 8;
#pragma unroll
      for (int i = 0; i < kStageTokens * kChunks / 32; ++i) {
        const int place = i * 32 / kChunks + lane / kChunks, chunk = lane % kChunks;
        // Behind the end the last token is copied again: what is masked must be finite all the same.
        const int64_t from = ((slot + min(place, tokens - 1 - token)) * p.kv_heads + head) * D + chunk * 8;
        const uint32_t to = target + place * kRowBytes<D> + chunk * 16;
        copy_16_bytes(to, static_cast<const T*>(p.k) + from, policy);
        copy_16_bytes(to + kStageTokens * kRowBytes<D>, static_cast<const T*>(p.v) + from, policy);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) copy_stage(stage);

  // The queries as an A fragment, straight from memory; rows from `share` on are zero.
  uint32_t query[D / 16][4];
  const T* const q = static_cast<const T*>(p.q) + ((int64_t)row * p.heads + head * share + quad) * D + lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    query[k][0] = quad < share ? __ldcg(reinterpret_cast<const unsigned int*>(q + k * 16)) : 0u;
    query[k][2] = quad < share ? __ldcg(reinterpret_cast<const unsigned int*>(q + k * 16 + 8)) : 0u;
    query[k][1] = query[k][3] = 0u;
  }
  const float scale = p.scale * kLog2e;
  Fragment<T, D> state;
  state.clear();
  for (int stage = 0; stage < num_stages; ++stage) {
    wait_copies<STAGES - 1>();
    __syncwarp();
    const uint32_t keys = shared_address(stages + stage % STAGES * kStageBytes<D>);
    float scores[kStageTokens / 8][4];
    uint32_t weights[1][4];
    state.template score<kStageTokens>(query, keys, tokens - stage * kStageTokens, scores);
    state.template softmax<kStageTokens>(scores, scale, weights);
    state.template add_values<kStageTokens>(weights, keys + kStageTokens * kRowBytes<D>);
    __syncwarp();
    copy_stage(stage + STAGES);
  }
  state.reduce_totals();

  wait_for_predecessor();
  const float own_top = state.top[0] * scale;
  // A query head has `teams` groups of four threads: they share the partial results out and join at the end.
  const int width = share > 4 ? 8 : share > 2 ? 4 : share;
  const int teams = 8 / width, team = quad / width, member = quad % width;
  float top = kLowest, total = 0.f, sum[D / 8][2];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) sum[n][0] = sum[n][1] = 0.f;
  // Joins `other_total` exponentials of maximum `other_top` (log2) and their weighted values, times the scale of each
  // half of the row.
  auto join = [&](float other_top, float other_total, float low_scale, float high_scale, auto value) {
    const float highest = fmaxf(top, other_top);
    const float keep = exp2_fast(top - highest), gain = exp2_fast(other_top - highest);
    top = highest;
    total = fmaf(total, keep, other_total * gain);
    const float low_factor = gain * low_scale, high_factor = gain * high_scale;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float2 pair = value(n);
      const float factor = n < D / 16 ? low_factor : high_factor;
      sum[n][0] = fmaf(sum[n][0], keep, pair.x * factor);
      sum[n][1] = fmaf(sum[n][1], keep, pair.y * factor);
    }
  };
  if (member < share) {
    constexpr int kAtOnce = 4, kWords = D / 32;
    for (int first = team; first < partials; first += kAtOnce * teams) {
      uint4 words[kAtOnce][kWords];
      float4 stats[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t place = first_partial + member + (int64_t)min(first + i * teams, partials - 1) * p.heads;
        const uint4* from = reinterpret_cast<const uint4*>(p.partials + place * D) + lane % 4;
        stats[i] = __ldcg(reinterpret_cast<const float4*>(p.stats) + place);
#pragma unroll
        for (int w = 0; w < kWords; ++w) words[i][w] = __ldcg(from + 4 * w);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i * teams < partials)
          join(stats[i].x, 1.f, stats[i].y, stats[i].w, [&](int n) {
            const uint4& word = words[i][n / 4];
            const unsigned int bits = n % 4 == 0 ? word.x : n % 4 == 1 ? word.y : n % 4 == 2 ? word.z : word.w;
            return __half22float2(*reinterpret_cast<const __half2*>(&bits));
          });
    }
  }
  for (int mask = 4 * width; mask < 32; mask *= 2) {
    const float other_top = __shfl_xor_sync(~0u, top, mask), other_total = __shfl_xor_sync(~0u, total, mask);
    join(other_top, other_total, 1.f, 1.f, [&](int n) {
      return make_float2(__shfl_xor_sync(~0u, sum[n][0], mask), __shfl_xor_sync(~0u, sum[n][1], mask));
    });
  }
  if (quad < share) {
    join(own_top, state.total[0], 1.f, 1.f, [&](int n) { return make_float2(state.out[n][0], state.out[n][1]); });
    const float inverse = 1.f / total;
    // Through shared memory, for whole 16-byte stores; the copies have all landed and been read.
    uint32_t* const staged = reinterpret_cast<uint32_t*>(stages + quad * kRowBytes<D>) + lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) staged[4 * n] = pack<T>(sum[n][0] * inverse, sum[n][1] * inverse);
  }
  __syncwarp();
  // The partial results are used up: the L2 cache need not write them to memory.
  const int lines = share * D * 2 / 128;
  for (int i = lane; i < partials * lines; i += 32) {
    const fp16* row = p.partials + (first_partial + (int64_t)(i / lines) * p.heads) * D;
    asm volatile("discard.global.L2 [%0], 128;" ::"l"(row + i % lines * 64) : "memory");
  }
  for (int i = lane; i < share * D / 8; i += 32)
    reinterpret_cast<uint4*>(out)[i] =
        *reinterpret_cast<const uint4*>(stages + i / (D / 8) * kRowBytes<D> + i % (D / 8) * 16);
}

template <class T, int D, int STAGES>
int launch_kernel(const Problem& p, cudaStream_t stream) {
  const int grid = (p.rows * p.kv_heads + kWarps - 1) / kWarps;
  return launch(finish_kernel<T, D, STAGES>, dim3(grid), dim3(32 * kWarps),
                kWarps * STAGES * kStageBytes<D>, stream, p);
}

}  // namespace

int launch_finish(const Problem& p, int64_t dtype, cudaStream_t stream) {
  if (dtype == kBFloat16 && p.head_dim == 64) return launch_kernel<bf16, 64, 4>(p, stream);
  if (dtype == kBFloat16 && p.head_dim == 128) return launch_kernel<bf16, 128, 2>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 64) return launch_kernel<fp16, 64, 4>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 128) return launch_kernel<fp16, 128, 2>(p, stream);
  return fail("decode attention on tensor cores takes head_dim 64 or 128, not %d", p.head_dim);
}

}  // namespace ember::decode
