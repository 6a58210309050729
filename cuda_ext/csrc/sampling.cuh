// What the sampling kernels share: the arguments, the walk over a row, random numbers, block-wide sums, and the last
// step of every draw, the search in one chunk.
//
// A row of logits is cut into chunks of 2048, whatever the batch, so that no result depends on the other rows. A warp
// reads a chunk in 16-byte pieces: piece v of lane l begins at element (v * 32 + l) * (elements a piece). The pieces of
// one lane are a group; its largest logit is kept for rows that have filters.
#pragma once

#include "common.cuh"

namespace ember::sampling {

using u64 = unsigned long long;

constexpr int kChunk = 2048;
constexpr int kMaxChunks = 512;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLowest = -3.402823466e38f;  // the lowest finite float; with -inf as a maximum, -inf - -inf is NaN
// Masses relative to the largest are summed as integers in units of 2^-42: exact, so in any order, and 2^20 tokens fit.
constexpr float kUnit = 4398046511104.f;

struct Args {
  const void* logits;
  const int* logits_rows;  // null: row i draws from line i
  const int *slot, *num_tokens, *top_k, *candidate;
  const float *temperature, *top_p, *min_p;
  const int64_t *seed, *prompt_hash;
  int* tokens;
  float *logprobs, *sampling_logprobs;
  float4* partials;    // [rows, chunks]: maximum, sum at temperature 1, sum at the row's temperature
  float* group_max;    // [rows, chunks * 32]
  int rows, vocab, chunks;
  bool aligned;        // all lines begin and end at multiples of 16 bytes
};

__device__ __forceinline__ bool has_filters(const Args& a, int row) {
  const int k = a.top_k[row];
  return a.temperature[row] != 0.f && ((k > 0 && k < a.vocab) || a.top_p[row] < 1.f || a.min_p[row] > 0.f);
}

template <class scalar>
__device__ __forceinline__ const scalar* line_of(const Args& a, int row) {
  const int64_t line = a.logits_rows ? a.logits_rows[row] : row;
  return static_cast<const scalar*>(a.logits) + line * a.vocab;
}

// Factor of a difference of logits in the exponent of 2; finite however small the temperature.
__device__ __forceinline__ float exponent_factor(float temperature) {
  return temperature == 0.f ? kLog2E : fminf(kLog2E / temperature, 1e30f);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u64 mass_of(float x, float largest, float factor) {
  return __float2ull_rn(exp2_fast((x - largest) * factor) * kUnit);
}

__device__ __forceinline__ float unpack(const float&, const uint32_t* words, int i) { return __uint_as_float(words[i]); }
__device__ __forceinline__ float unpack(const bf16&, const uint32_t* words, int i) {
  return __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
}
__device__ __forceinline__ float unpack(const fp16&, const uint32_t* words, int i) {
  return __half2float(__ushort_as_half((unsigned short)(words[i / 2] >> i % 2 * 16)));
}
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(bf16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(fp16 x) { return __half_as_ushort(x); }

// 16 bytes of logits, kept as words: a narrow element to a register would take twice as many.
template <class scalar>
struct Piece {
  static constexpr int kSize = 16 / sizeof(scalar);
  static constexpr int kPerLane = kChunk / 32 / kSize;
  uint32_t words[4];

  // Elements at or behind `vocab` are -inf. In aligned lines a piece lies all before or all behind it.
  __device__ __forceinline__ void load_aligned(const scalar* line, int start, int vocab) {
    const uint32_t none = bits_of(from_float<scalar>(-INFINITY)) * (sizeof(scalar) == 2 ? 0x10001u : 1u);
    uint4 four = {none, none, none, none};
    if (start < vocab) four = *reinterpret_cast<const uint4*>(line + start);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }
  __device__ __forceinline__ void load_anywhere(const scalar* line, int start, int vocab) {
    words[0] = words[1] = words[2] = words[3] = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const scalar value = start + i < vocab ? line[start + i] : from_float<scalar>(-INFINITY);
      words[i * 4 / kSize] |= bits_of(value) << (kSize == 8 ? i % 2 * 16 : 0);
    }
  }
  __device__ __forceinline__ void load(const scalar* line, int start, int vocab, bool aligned) {
    if (aligned) {
      load_aligned(line, start, vocab);
    } else {
      load_anywhere(line, start, vocab);
    }
  }
  // Lets the compiler unpack again rather than keep the floats, which are twice as many registers.
  __device__ __forceinline__ void forget_unpacked() {
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
  }
  __device__ __forceinline__ float operator[](int i) const { return unpack(scalar(), words, i); }
};

// Philox4x32-10 (Salmon et al. 2011, section 3.3) with the counters of cuda_ext/sampling.py: a number in (0, 1).
__device__ inline double uniform(const Args& a, int row) {
  const u64 seed = a.seed[row], prompt = a.prompt_hash[row];
  uint32_t c0 = a.candidate[row], c1 = a.num_tokens[a.slot[row]], c2 = (uint32_t)prompt, c3 = (uint32_t)(prompt >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (double)(((u64)c0 << 20) | (c1 >> 12)) * 0x1p-52 + 0x1p-53;
}

// Sum over the block of the threads before this one; `total` is the sum over all. The sum behind a thread is, to the
// bit, the sum before the next one.
template <int kThreads, class T>
__device__ __forceinline__ T scan(T value, T& through, T& total) {
  __shared__ T warp_totals[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // of an earlier call everybody has read the totals
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  T offset = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i == warp) offset = total;
    total += warp_totals[i];
  }
  const T before = __shfl_up_sync(~0u, sum, 1);
  through = offset + sum;
  return lane ? offset + before : offset;
}

template <int kThreads>
__device__ __forceinline__ float block_max(float value) {
  __shared__ float warp_max[kThreads / 32];
#pragma unroll
  for (int step = 16; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) value = fmaxf(value, warp_max[i]);
  return value;
}

// What the partials of a row come to. Sums are relative to the largest logit; `sum_1` is at least 1 unless a logit is
// NaN or +inf or all are -inf.
struct RowSums {
  float largest;
  double sum_1, sum_t;
  __device__ bool usable() const { return sum_1 >= 0.5; }
};

__device__ __forceinline__ void write_result(
    const Args& a, int row, int token, float x, const RowSums& sums, double kept_sum, bool greedy) {
  a.tokens[row] = token;
  const double below = (double)x - sums.largest;
  a.logprobs[row] = (float)(below - log(sums.sum_1));
  a.sampling_logprobs[row] = greedy ? 0.f : (float)(below / a.temperature[row] - log(kept_sum));
}

__device__ __forceinline__ void write_unusable(const Args& a, int row) {
  a.tokens[row] = 0;
  a.logprobs[row] = NAN;
  a.sampling_logprobs[row] = a.temperature[row] == 0.f ? 0.f : NAN;
}

// Calls found(token, logit) in one thread: for the token of the chunk in whose stretch of the cumulative mass, over
// tokens of at least `threshold`, `target` lies. Needs a token with mass; a target behind all of them takes the last.
template <int kThreads, class scalar, class Found>
__device__ __forceinline__ void draw_in_chunk(
    const Args& a, const scalar* line, int chunk, float largest, float factor, float threshold, u64 target,
    Found found) {
  constexpr int kEach = kChunk / kThreads;
  const int first = chunk * kChunk + (int)threadIdx.x * kEach;
  float x[kEach];
  u64 sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) x[i] = first + i < a.vocab ? to_float(line[first + i]) : -INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += x[i] >= threshold ? mass_of(x[i], largest, factor) : 0;
  u64 through, total;
  u64 before = scan<kThreads>(sum, through, total);
  target = min(target, total - 1);
  if (before > target || target >= through) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const u64 mass = x[i] >= threshold ? mass_of(x[i], largest, factor) : 0;
    if (before <= target && target < before + mass) found(first + i, x[i]);
    before += mass;
  }
}

}  // namespace ember::sampling
