// Group decode attention for engines of few rows, in one launch.
//
// A unit of work is one KV head and one item (up to 64 query rows over a piece of at most kPiece tokens), or one KV
// head and the last piece of one row's suffix. A CTA holds a whole piece in shared memory: its warps take 16 tokens
// each for the scores and 16 dims each for the weighted sums, so nothing is summed over warps but maxima and totals.
// K and V that earlier steps wrote are asked for before the kernels before this one have ended.
//
// The CTA of a row's last piece waits until all pieces before it have been counted in p.arrivals, and merges: their
// order is fixed, whoever comes last. All items stand before all last pieces and no more CTAs are launched than the
// GPU holds at once, so whoever is waited for is running or done.
#include "decode_attention.cuh"

namespace ember::decode {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kPiece = 16 * kWarps;
constexpr float kLowest = -1e30f;  // below every log of a sum; finite, so that differences are

template <int D>
struct Shared {
  alignas(128) char keys[kPiece * kRowBytes<D>];
  char values[kPiece * kRowBytes<D>];
  char queries[kQueryRows * kRowBytes<D>];
  char weights[16 * kRowBytes<kPiece>];
  float tops[kWarps][16], totals[kWarps][16];
  float own[8][D];  // of the last piece: weighted sums of the query heads
  float2 own_stats[8];
  int targets[kQueryRows];  // where a query row's partial result goes; -1: nowhere
};

__device__ __forceinline__ int load_acquire(const int* from) {
  int value = 0;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// The next kernel starts no sooner: so all that stood before this one in the stream has ended when the next layer's
// attention reads the K and V of earlier steps.
__device__ __forceinline__ void wait_then_trigger() {
  wait_for_predecessor();
  let_successor_start();
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2) few_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(128) char bytes[];
  Shared<D>& s = *reinterpret_cast<Shared<D>*>(bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = p.heads / p.kv_heads;
  const int block_shift = __ffs(p.block_size) - 1;
  const float scale = p.scale * kLog2e;
  constexpr int kChunks = D / 8;  // of 16 bytes in a row
  const uint64_t policy = evict_first_policy();
  float* const partials = reinterpret_cast<float*>(p.partials);

  // 16 tokens a warp, which lie in one block. Behind the end the last token is copied again: what is masked must be
  // finite all the same.
  auto copy_tokens = [&](const int* table, int tokens, int head) {
    const int last = tokens - 1, first = min(warp * 16, last & ~15);
    const int64_t block = __ldg(table + (first >> block_shift));
    const int64_t stride = (int64_t)p.kv_heads * D;
    const int64_t base = ((block << block_shift) + (first & (p.block_size - 1))) * stride + head * D;
    auto copy = [&](const void* cache, char* to) {
      const T* const from = static_cast<const T*>(cache) + base + lane % kChunks * 8;
      const uint32_t target = shared_address(to) + warp * 16 * kRowBytes<D> + lane % kChunks * 16;
#pragma unroll
      for (int i = 0; i < 16; i += 32 / kChunks) {
        const int row = i + lane / kChunks;
        copy_16_bytes(target + row * kRowBytes<D>, from + min(row, last - first) * stride, policy);
      }
    };
    copy(p.k, s.keys);
    copy(p.v, s.values);
  };
  // `count` query rows of one KV head, of consecutive rows of the batch; tiles are filled up with the last one.
  auto copy_queries = [&](int first_row, int head, int count) {
    const T* const from = static_cast<const T*>(p.q) + head * share * D;
    for (int i = threadIdx.x; i < (count + 15) / 16 * 16 * kChunks; i += kThreads) {
      const int row = min(i / kChunks, count - 1), chunk = i % kChunks;
      copy_16_bytes(shared_address(s.queries) + i / kChunks * kRowBytes<D> + chunk * 16,
                    from + ((int64_t)(first_row + row / share) * p.heads + row % share) * D + chunk * 8, policy);
    }
  };
  // Rows lane / 4 and lane / 4 + 8 of a tile of query rows over the piece. `out` are the dims 16 warp + 8 n +
  // 2 (lane % 4) + {0, 1} of both, not yet divided by `total`.
  auto attend = [&](int tile, int tokens, float (&out)[2][4], float (&top)[2], float (&total)[2]) {
    const uint32_t lane_offset = lane / 16 * 16, lane_row = lane % 16;
    uint32_t query[D / 16][4];
    const uint32_t queries = shared_address(s.queries) + (tile * 16 + lane_row) * kRowBytes<D> + lane_offset;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_matrices(query[k], queries + k * 32);
    float scores[2][4];
    Fragment<T, D>().template score<16>(query, shared_address(s.keys) + warp * 16 * kRowBytes<D>, tokens - warp * 16,
                                        scores);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
      highest = fmaxf(highest, fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      if (lane % 4 == 0) s.tops[warp][lane / 4 + 8 * r] = highest;
    }
    __syncthreads();
    char* const weights = s.weights + lane / 4 * kRowBytes<kPiece> + (warp * 16 + lane % 4 * 2) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = s.tops[0][lane / 4 + 8 * r];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, s.tops[w][lane / 4 + 8 * r]);
      top[r] = highest * scale;
      const float base = highest == -INFINITY ? 0.f : top[r];
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float low = exp2_fast(fmaf(scores[j][2 * r], scale, -base));
        const float high = exp2_fast(fmaf(scores[j][2 * r + 1], scale, -base));
        sum += low + high;
        *reinterpret_cast<uint32_t*>(weights + r * 8 * kRowBytes<kPiece> + j * 16) = pack<T>(low, high);
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) s.totals[warp][lane / 4 + 8 * r] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total[r] += s.totals[w][lane / 4 + 8 * r];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i / 4][i % 4] = 0.f;
    if (warp * 16 < D) {
      const uint32_t a_from = shared_address(s.weights) + lane_row * kRowBytes<kPiece> + lane_offset;
      const uint32_t b_from = shared_address(s.values) + lane_row * kRowBytes<D> + lane_offset + warp * 32;
#pragma unroll
      for (int k = 0; k < kPiece / 16; ++k) {
        if (k * 16 >= tokens) break;
        uint32_t a[4], b[4];
        load_matrices(a, a_from + k * 32);
        load_matrices_transposed(b, b_from + k * 16 * kRowBytes<D>);
        mma<T>(out[0], a, b[0], b[1]);
        mma<T>(out[1], a, b[2], b[3]);
      }
    }
  };

  auto item_unit = [&](const Item& item, int head, bool first) {
    const int* const table = (item.kind == 0 ? p.prefix_blocks : p.suffix_blocks) + item.first_block;
    const int* const length = p.suffix_lens + item.first_row;
    // A length read here may be that of the step before. It shrinks only where a row has ended: what is counted too much
    // then belongs to that row, and goes before the row gets another owner.
    const bool early = item.kind == 0 || __ldcg(length) > item.live_above;
    if (early) copy_tokens(table, item.tokens, head);
    const int count = item.num_rows * share;
    if (threadIdx.x < kQueryRows) {
      const int row = threadIdx.x, candidate = row / share;
      s.targets[row] = row < count ? (__ldg(p.partial_starts + item.first_row + candidate) + item.partial) * p.heads +
                                         head * share + row % share
                                   : -1;
    }
    if (first) wait_then_trigger();
    if (!early) {
      if (__ldcg(length) <= item.live_above) return;
      copy_tokens(table, item.tokens, head);
    }
    copy_queries(item.first_row, head, count);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    for (int tile = 0; tile * 16 < count; ++tile) {
      float out[2][4], top[2], total[2];
      attend(tile, item.tokens, out, top, total);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t target = s.targets[tile * 16 + r * 8 + lane / 4];
        if (target < 0) continue;
        float* const to = partials + target * D + warp * 16 + lane % 4 * 2;
        if (warp * 16 < D) {
          __stcg(reinterpret_cast<float2*>(to), make_float2(out[0][2 * r], out[0][2 * r + 1]));
          __stcg(reinterpret_cast<float2*>(to + 8), make_float2(out[1][2 * r], out[1][2 * r + 1]));
        }
        if (warp == 0 && lane % 4 == 0) __stcg(p.stats + target, make_float2(top[r], total[r]));
      }
    }
    __syncthreads();
    if (threadIdx.x < item.num_rows) {
      __threadfence();
      atomicAdd(p.arrivals + (item.first_row + threadIdx.x) * p.kv_heads + head, 1);
    }
  };

  // Joins partial results `first`, first + step, ... of one query head: four dims a thread.
  auto merge = [&](int64_t first_place, int partial_count, int first, int step, int dim, float& top, float& total,
                   float4& sum) {
    constexpr int kAtOnce = 8;
    for (int from = first; from < partial_count; from += kAtOnce * step) {
      float2 stats[kAtOnce];
      float4 part[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t place = first_place + (int64_t)min(from + i * step, partial_count - 1) * p.heads;
        stats[i] = __ldcg(p.stats + place);
        part[i] = __ldcg(reinterpret_cast<const float4*>(partials + place * D) + dim);
      }
      float highest = top;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (from + i * step >= partial_count) stats[i].x = -INFINITY;
        highest = fmaxf(highest, stats[i].x);
      }
      const float keep = exp2_fast(top - highest);
      top = highest;
      total *= keep;
      sum = make_float4(sum.x * keep, sum.y * keep, sum.z * keep, sum.w * keep);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float gain = exp2_fast(stats[i].x - highest);
        total = fmaf(stats[i].y, gain, total);
        sum = make_float4(fmaf(part[i].x, gain, sum.x), fmaf(part[i].y, gain, sum.y), fmaf(part[i].z, gain, sum.z),
                          fmaf(part[i].w, gain, sum.w));
      }
    }
  };

  auto last_unit = [&](int row, int head, bool first) {
    const int group = __ldg(p.row_group + row), start = __ldg(p.suffix_starts + row);
    const int64_t first_partial = __ldg(p.partial_starts + row);
    // May be the length of the step before. All but its last token were written before this step.
    const int early_length = __ldcg(p.suffix_lens + row);
    const int early_begin = max(early_length - 1, 0) / kPiece * kPiece;
    const int early_tokens = group < 0 ? 0 : early_length - 1 - early_begin;
    const int* const table = p.suffix_blocks + start;
    if (early_tokens > 0) copy_tokens(table + (early_begin >> block_shift), early_tokens, head);
    const int prefix_pieces = group < 0 ? 0 : (__ldg(p.prefix_lens + group) + kPiece - 1) / kPiece;
    if (first) wait_then_trigger();
    const int length = group < 0 ? 0 : __ldcg(p.suffix_lens + row);
    T* const to = static_cast<T*>(p.out) + ((int64_t)row * p.heads + head * share) * D;
    if (length <= 0) {
      for (int i = threadIdx.x; i < share * D / 8; i += kThreads)
        reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
      return;
    }
    const int begin = (length - 1) / kPiece * kPiece, tokens = length - begin;
    commit_copies();
    wait_copies<0>();  // some rows are written anew now
    if (early_tokens > 0 && begin == early_begin) {
      __syncthreads();
      for (int i = threadIdx.x; i < (tokens - early_tokens) * 2 * kChunks; i += kThreads) {
        const int place = early_tokens + i / (2 * kChunks), chunk = i % kChunks, token = begin + place;
        const int64_t block = __ldg(table + (token >> block_shift));
        const int64_t from =
            (((block << block_shift) + (token & (p.block_size - 1))) * p.kv_heads + head) * D + chunk * 8;
        const bool is_value = i / kChunks % 2;
        copy_16_bytes(shared_address(is_value ? s.values : s.keys) + place * kRowBytes<D> + chunk * 16,
                      static_cast<const T*>(is_value ? p.v : p.k) + from, policy);
      }
    } else {
      copy_tokens(table + (begin >> block_shift), tokens, head);
    }
    copy_queries(row, head, share);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float out[2][4], top[2], total[2];
    attend(0, tokens, out, top, total);
    if (lane / 4 < share) {
      if (warp * 16 < D) {
        float* const own = &s.own[lane / 4][warp * 16 + lane % 4 * 2];
        *reinterpret_cast<float2*>(own) = make_float2(out[0][0], out[0][1]);
        *reinterpret_cast<float2*>(own + 8) = make_float2(out[1][0], out[1][1]);
      }
      if (warp == 0 && lane % 4 == 0) s.own_stats[lane / 4] = make_float2(top[0], total[0]);
    }
    const int count = prefix_pieces + begin / kPiece;
    if (threadIdx.x == 0) {
      int* const arrivals = p.arrivals + row * p.kv_heads + head;
      while (load_acquire(arrivals) < count) {
      }
      *arrivals = 0;  // for the next launch
    }
    __syncthreads();

    // Teams of threads share out the partial results; the first team joins the teams' sums and the last piece.
    const int slots = share * (D / 4), teams = kThreads / slots;
    const int team = threadIdx.x / slots, slot = threadIdx.x % slots, query_head = slot / (D / 4), dim = slot % (D / 4);
    float4* const team_sums = reinterpret_cast<float4*>(s.keys);
    float2* const team_stats = reinterpret_cast<float2*>(s.values);
    float highest = kLowest, sum_total = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (team < teams)
      merge(first_partial * p.heads + head * share + query_head, count, team, teams, dim, highest, sum_total, sum);
    team_sums[threadIdx.x] = sum;
    team_stats[threadIdx.x] = make_float2(highest, sum_total);
    __syncthreads();
    if (team == 0) {
      auto join = [&](float2 stats, float4 part) {
        const float before = highest;
        highest = fmaxf(before, stats.x);
        const float keep = exp2_fast(before - highest), gain = exp2_fast(stats.x - highest);
        sum_total = fmaf(stats.y, gain, sum_total * keep);
        sum = make_float4(fmaf(part.x, gain, sum.x * keep), fmaf(part.y, gain, sum.y * keep),
                          fmaf(part.z, gain, sum.z * keep), fmaf(part.w, gain, sum.w * keep));
      };
      for (int other = 1; other < teams; ++other)
        join(team_stats[other * slots + slot], team_sums[other * slots + slot]);
      join(s.own_stats[query_head], *reinterpret_cast<const float4*>(&s.own[query_head][dim * 4]));
      const float inverse = 1.f / sum_total;
      reinterpret_cast<uint2*>(to)[slot] =
          make_uint2(pack<T>(sum.x * inverse, sum.y * inverse), pack<T>(sum.z * inverse, sum.w * inverse));
    }
  };

  int unit = blockIdx.x;
  const int heads = p.kv_heads, num_items = __ldg(p.num_items);
  auto item_of = [&](int place) {
    const int4* const words = reinterpret_cast<const int4*>(p.items) + 2 * min(place, p.max_items - 1);
    const int4 a = __ldg(words), b = __ldg(words + 1);
    return Item{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  };
  Item item = item_of(unit / heads);  // before their number is known
  const int units = (num_items + p.rows) * heads;
  bool first = true;
  for (; unit < units; unit += gridDim.x) {
    if (unit < num_items * heads) {
      if (!first) item = item_of(unit / heads);
      item_unit(item, unit % heads, first);
    } else {
      last_unit(unit / heads - num_items, unit % heads, first);
    }
    first = false;
    __syncthreads();  // shared memory is free again
  }
}

template <class T, int D>
int launch_kernel(const Problem& p, cudaStream_t stream) {
  static const int at_once = [] {
    int count = 0;
    cudaFuncSetAttribute(few_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(Shared<D>));
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, few_kernel<T, D>, kThreads, sizeof(Shared<D>));
    return count * device_info().multiprocessors;
  }();
  if (at_once == 0) return fail("decode attention needs %d bytes of shared memory", (int)sizeof(Shared<D>));
  const int grid = min(at_once, (p.max_items + p.rows) * p.kv_heads);
  return launch(few_kernel<T, D>, dim3(grid), dim3(kThreads), sizeof(Shared<D>), stream, p);
}

}  // namespace

bool takes_few(const Problem& p, int64_t dtype) {
  return p.arrivals != nullptr && p.split_tokens == kPiece && p.max_items > 0 && fits_tensor_cores(p, dtype);
}

int launch_few(const Problem& p, int64_t dtype, cudaStream_t stream) {
  if (dtype == kBFloat16 && p.head_dim == 64) return launch_kernel<bf16, 64>(p, stream);
  if (dtype == kBFloat16 && p.head_dim == 128) return launch_kernel<bf16, 128>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 64) return launch_kernel<fp16, 64>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 128) return launch_kernel<fp16, 128>(p, stream);
  return fail("decode attention on tensor cores takes head_dim 64 or 128, not %d", p.head_dim);
}

}  // namespace ember::decode
