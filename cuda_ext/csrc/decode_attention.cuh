// Group decode attention: what its kernels share. See decode_attention.cu for how they work together.
#pragma once

#include "common.cuh"

namespace ember::decode {

constexpr int kQueryRows = 64;   // query rows of one item at most: candidates times query heads of a KV head
constexpr int kTileTokens = 64;  // tokens of one tile in shared memory

// All pointers on the device; sizes as in cuda_ext/decode_groups.py.
struct Problem {
  const void *q, *k, *v;
  void* out;
  // Of the two kernels: [num_partials, heads, head_dim], each row in the order of Fragment, times 1 / stats.y; and
  // [num_partials, heads, halves of a row]: log2 of the sum of exponentials, and a power of two. The one kernel has
  // float32 sums of weighted values, and [num_partials, heads]: log2 of the greatest exponential, and their sum.
  fp16* partials;
  float2* stats;
  const int *row_group, *prefix_blocks, *prefix_starts, *prefix_lens, *suffix_blocks, *suffix_starts, *suffix_lens;
  const int *partial_starts, *items, *num_items;
  int max_items, rows, heads, kv_heads, head_dim, block_size, split_tokens;
  float scale;
  int* arrivals;  // [rows, kv_heads], zero between launches; null where there is none

  int share() const { return heads / kv_heads; }
};

// One piece of work of the split kernel; the last fields of a row of DecodeGroups.items are padding.
struct Item {
  int first_row, num_rows;
  int partial;      // which of its rows' partial results
  int kind;         // 0: of the group's prefix, 1: of the row's suffix
  int first_block;  // where its KV blocks begin in prefix_blocks or suffix_blocks
  int tokens;
  int live_above;   // a suffix piece is computed once the suffix is longer than this
  int unused;
};
static_assert(sizeof(Item) == 32, "items are read as two 16-byte words");

bool fits_tensor_cores(const Problem& problem, int64_t dtype);
bool takes_few(const Problem& problem, int64_t dtype);
int launch_few(const Problem& problem, int64_t dtype, cudaStream_t stream);
int launch_splits(const Problem& problem, int64_t dtype, cudaStream_t stream);
int launch_finish(const Problem& problem, int64_t dtype, cudaStream_t stream);
int launch_generic(const Problem& problem, int64_t dtype, cudaStream_t stream);

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- copies into shared memory ----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}

// KV is read once a layer: it must not push the partial results out of the L2 cache.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Partial results stay in the L2 cache until they are merged.
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- tensor cores: m16n8k16, fragments as the PTX ISA names them ------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

// ---- one warp: 16 query rows over a run of tokens ---------------------------------------------------------------

// Rows of K and V in shared memory are padded by 16 bytes, so that ldmatrix meets no bank conflict.
template <int D>
constexpr int kRowBytes = D * 2 + 16;

// The state of an online softmax over 16 rows. A thread holds two of them, lane / 4 and lane / 4 + 8, and of each the
// dims 8 n + 2 (lane % 4) + {0, 1}: out[n][0..1] and out[n][2..3].
template <class T, int D>
struct Fragment {
  float out[D / 8][4];
  float top[2];    // greatest score so far, before scaling
  float total[2];  // this thread's part of the sum of exponentials

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.f;
    top[0] = top[1] = -INFINITY;
    total[0] = total[1] = 0.f;
  }

  // Scores of TOKENS tokens, whose K begins at `keys` in shared memory; tokens from `valid` on count as absent.
  template <int TOKENS>
  __device__ __forceinline__ void score(const uint32_t (&query)[D / 16][4], uint32_t keys, int valid,
                                        float (*s)[4]) const {
    const int lane = threadIdx.x % 32;
    const uint32_t address = keys + ((lane / 16) * 8 + lane % 8) * kRowBytes<D> + (lane / 8 % 2) * 16;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int j = 0; j < TOKENS / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, address + j * 16 * kRowBytes<D> + k * 32);
        mma<T>(s[2 * j], query[k], b[0], b[1]);
        mma<T>(s[2 * j + 1], query[k], b[2], b[3]);
      }
    if (valid < TOKENS) {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (j * 8 + lane % 4 * 2 + i % 2 >= valid) s[j][i] = -INFINITY;
    }
  }

  // Scores become probabilities in `weights`, packed as A fragments; what was summed before is rescaled.
  template <int TOKENS>
  __device__ __forceinline__ void softmax(float (&s)[TOKENS / 8][4], float scale, uint32_t (&weights)[TOKENS / 16][4]) {
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j) highest[r] = fmaxf(highest[r], fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(~0u, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(~0u, highest[r], 2));
    }
    // Where no row's maximum grew, the factors are exactly 1.
    if (__any_sync(~0u, highest[0] > top[0] || highest[1] > top[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float factor = highest[r] == top[r] ? 1.f : exp2_fast((top[r] - highest[r]) * scale);
        top[r] = highest[r];
        total[r] *= factor;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[n][2 * r] *= factor;
          out[n][2 * r + 1] *= factor;
        }
      }
    }
    const float base[2] = {top[0] == -INFINITY ? 0.f : top[0] * scale, top[1] == -INFINITY ? 0.f : top[1] * scale};
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = exp2_fast(fmaf(s[j][2 * r], scale, -base[r]));
        const float high = exp2_fast(fmaf(s[j][2 * r + 1], scale, -base[r]));
        total[r] += low + high;
        weights[j / 2][j % 2 * 2 + r] = pack<T>(low, high);
      }
  }

  // Adds the weighted rows of V, which begin at `values` in shared memory.
  template <int TOKENS>
  __device__ __forceinline__ void add_values(const uint32_t (*weights)[4], uint32_t values) {
    const int lane = threadIdx.x % 32;
    const uint32_t address = values + (lane % 16) * kRowBytes<D> + (lane / 16) * 16;
#pragma unroll
    for (int j = 0; j < TOKENS / 16; ++j)
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, address + j * 16 * kRowBytes<D> + n * 16);
        mma<T>(out[n], weights[j], b[0], b[1]);
        mma<T>(out[n + 1], weights[j], b[2], b[3]);
      }
  }

  // Afterwards all four threads of a row know its whole sum of exponentials.
  __device__ __forceinline__ void reduce_totals() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
    }
  }
};

}  // namespace ember::decode
