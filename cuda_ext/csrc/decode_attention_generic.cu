// Group decode attention for float32 and for head dims and block sizes that the tensor-core kernels do not take.
//
// One CTA a row, KV head and chunk of up to 8 of its query heads; warps take tokens 32 by 32. All sums are float32.
// The prefix is read for every candidate (from the L2 cache at best): this path is for correctness, not for speed.
#include "decode_attention.cuh"

namespace ember::decode {
namespace {

constexpr int kWarps = 8, kHeads = 8, kMaxDim = 256, kDimsPerLane = kMaxDim / 32;

template <class T>
__global__ void __launch_bounds__(32 * kWarps) generic_kernel(const __grid_constant__ Problem p) {
  __shared__ float query[kHeads][kMaxDim];
  __shared__ float warp_top[kWarps][kHeads], warp_total[kWarps][kHeads], joined[kHeads][kMaxDim];
  const int row = blockIdx.x, head = blockIdx.y, share = p.heads / p.kv_heads, dim = p.head_dim;
  const int first_head = head * share + blockIdx.z * kHeads, num_heads = min(kHeads, share - (int)blockIdx.z * kHeads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_predecessor();
  let_successor_start();
  const int64_t base = ((int64_t)row * p.heads + first_head) * dim;
  T* const out = static_cast<T*>(p.out) + base;
  const int group = p.row_group[row], suffix = p.suffix_lens[row];
  if (group < 0 || suffix <= 0) {
    for (int i = threadIdx.x; i < num_heads * dim; i += blockDim.x) out[i] = from_float<T>(0.f);
    return;
  }
  for (int i = threadIdx.x; i < num_heads * dim; i += blockDim.x)
    query[i / dim][i % dim] = to_float(static_cast<const T*>(p.q)[base + i]) * (p.scale * kLog2e);
  for (int i = threadIdx.x; i < kHeads * kMaxDim; i += blockDim.x) joined[i / kMaxDim][i % kMaxDim] = 0.f;
  __syncthreads();

  const int prefix = p.prefix_lens[group], tokens = prefix + suffix;
  const int *prefix_blocks = p.prefix_blocks + p.prefix_starts[group],
            *suffix_blocks = p.suffix_blocks + p.suffix_starts[row];
  float top[kHeads], total[kHeads], sum[kHeads][kDimsPerLane];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    top[h] = -INFINITY;
    total[h] = 0.f;
#pragma unroll
    for (int i = 0; i < kDimsPerLane; ++i) sum[h][i] = 0.f;
  }
  for (int first = warp * 32; first < tokens; first += 32 * kWarps) {
    // Scores: a lane a token.
    const int token = first + lane;
    int64_t place = 0;
    float score[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) score[h] = -INFINITY;
    if (token < tokens) {
      const int inside = token < prefix ? token : token - prefix;
      const int block = (token < prefix ? prefix_blocks : suffix_blocks)[inside / p.block_size];
      place = (((int64_t)block * p.block_size + inside % p.block_size) * p.kv_heads + head) * dim;
      const T* key = static_cast<const T*>(p.k) + place;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) score[h] = 0.f;
      for (int d = 0; d < dim; d += 4) {
        float k[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) k[i] = to_float(key[d + i]);
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
          if (h < num_heads) {
            const float4 q = *reinterpret_cast<const float4*>(&query[h][d]);
            score[h] = fmaf(q.x, k[0], fmaf(q.y, k[1], fmaf(q.z, k[2], fmaf(q.w, k[3], score[h]))));
          }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= num_heads) continue;
      float highest = score[h];
#pragma unroll
      for (int step = 16; step; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
      highest = fmaxf(highest, top[h]);
      const float keep = exp2f(top[h] - highest);
      top[h] = highest;
      score[h] = exp2f(score[h] - highest);
      total[h] = fmaf(total[h], keep, score[h]);  // each lane's own part
#pragma unroll
      for (int i = 0; i < kDimsPerLane; ++i) sum[h][i] *= keep;
    }
    // Values: a lane a dim.
    const int count = min(32, tokens - first);
    for (int t = 0; t < count; ++t) {
      const T* value = static_cast<const T*>(p.v) + __shfl_sync(~0u, place, t);
      float v[kDimsPerLane];
#pragma unroll
      for (int i = 0; i < kDimsPerLane; ++i) v[i] = lane + 32 * i < dim ? to_float(value[lane + 32 * i]) : 0.f;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float weight = __shfl_sync(~0u, score[h], t);
        if (h < num_heads) {
#pragma unroll
          for (int i = 0; i < kDimsPerLane; ++i) sum[h][i] = fmaf(weight, v[i], sum[h][i]);
        }
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int step = 16; step; step /= 2) total[h] += __shfl_xor_sync(~0u, total[h], step);
    if (lane == 0) {
      warp_top[warp][h] = top[h];
      warp_total[warp][h] = total[h];
    }
  }
  // The warps add their parts one after another: a fixed order.
  for (int turn = 0; turn < kWarps; ++turn) {
    __syncthreads();
    if (turn != warp) continue;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= num_heads) continue;
      float highest = -INFINITY;
      for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, warp_top[w][h]);
      const float factor = exp2f(top[h] - highest);
#pragma unroll
      for (int i = 0; i < kDimsPerLane; ++i) joined[h][lane + 32 * i] += sum[h][i] * factor;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_heads * dim; i += blockDim.x) {
    const int h = i / dim;
    float highest = -INFINITY, sum_of_all = 0.f;
    for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, warp_top[w][h]);
    for (int w = 0; w < kWarps; ++w) sum_of_all = fmaf(warp_total[w][h], exp2f(warp_top[w][h] - highest), sum_of_all);
    out[i] = from_float<T>(joined[h][i % dim] / sum_of_all);
  }
}

}  // namespace

int launch_generic(const Problem& p, int64_t dtype, cudaStream_t stream) {
  if (p.head_dim % 8 || p.head_dim > kMaxDim)
    return fail("decode attention takes head dims that are multiples of 8 up to %d, not %d", kMaxDim, p.head_dim);
  const dim3 grid(p.rows, p.kv_heads, (p.share() + kHeads - 1) / kHeads);
  EMBER_DISPATCH(dtype, return launch(generic_kernel<scalar>, grid, dim3(32 * kWarps), 0, stream, p));
  return 0;
}

}  // namespace ember::decode
