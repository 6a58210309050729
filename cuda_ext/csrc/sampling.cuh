// What the sampling kernels share: the arguments, the walk over a line of logits, random numbers, and the search for
// the place in a cumulative sum where a draw falls.
//
// A line is cut into chunks of 2048, whatever the batch, so that no result depends on the other rows. A warp reads a
// chunk in 16-byte pieces: piece v of lane l begins at element (v * 32 + l) * (elements a piece). The pieces of one
// lane are a group; its largest logit is kept for rows that have filters.
#pragma once

#include "common.cuh"

namespace ember::sampling {

using u64 = unsigned long long;

constexpr int kThreads = 256;  // of a block that draws
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
  float4* partials;  // [rows, chunks]: maximum, sum at temperature 1, sum at the row's temperature
  float* group_max;  // [rows, chunks * 32]
  int rows, vocab, chunks;
};

// What a row asks for. Loaded at once: one after the other, as conditions would have it, the loads would take longer
// than the reading of a chunk.
struct Wish {
  int slot, top_k;
  float temperature, top_p, min_p;
  bool filtered;

  __device__ __forceinline__ Wish() {}
  __device__ __forceinline__ Wish(const Args& a, int row) {
    slot = a.slot[row], top_k = a.top_k[row];
    temperature = a.temperature[row], top_p = a.top_p[row], min_p = a.min_p[row];
    asm volatile("" ::"r"(slot), "r"(top_k), "f"(temperature), "f"(top_p), "f"(min_p));
    if (top_k >= a.vocab || top_k < 0) top_k = 0;
    filtered = (temperature != 0.f) & ((top_k > 0) | (top_p < 1.f) | (min_p > 0.f));
  }
};

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
  uint32_t words[4];

  __device__ __forceinline__ float operator[](int i) const { return unpack(scalar(), words, i); }
  // Lets the compiler unpack again rather than keep the floats, which are twice as many registers.
  __device__ __forceinline__ void forget_unpacked() {
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
  }
};

// A line of logits, -inf behind its end. In aligned ones a piece lies all before or all behind the end.
template <class scalar_, bool kAligned>
struct Line {
  using scalar = scalar_;
  static constexpr int kSize = Piece<scalar>::kSize;
  static constexpr int kPerLane = kChunk / 32 / kSize;  // pieces of a chunk
  const scalar* logits;
  int vocab;

  __device__ __forceinline__ Line(const Args& a, int row) : vocab(a.vocab) {
    const int64_t line = a.logits_rows ? a.logits_rows[row] : row;
    logits = static_cast<const scalar*>(a.logits) + line * a.vocab;
  }
  __device__ __forceinline__ Piece<scalar> piece(int start) const {
    const uint32_t none = bits_of(from_float<scalar>(-INFINITY));
    Piece<scalar> piece;
    if (kAligned) {
      const uint32_t word = none * (sizeof(scalar) == 2 ? 0x10001u : 1u);
      uint4 four = {word, word, word, word};
      if (start < vocab) four = *reinterpret_cast<const uint4*>(logits + start);
      piece.words[0] = four.x, piece.words[1] = four.y, piece.words[2] = four.z, piece.words[3] = four.w;
    } else {
      piece.words[0] = piece.words[1] = piece.words[2] = piece.words[3] = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const uint32_t bits = start + i < vocab ? bits_of(logits[start + i]) : none;
        piece.words[i * 4 / kSize] |= bits << (kSize == 8 ? i % 2 * 16 : 0);
      }
    }
    return piece;
  }
};

// Philox4x32-10 (Salmon et al. 2011, section 3.3) with the counters of cuda_ext/sampling.py: a number in (0, 1).
__device__ __forceinline__ double uniform(const Args& a, int row, int position) {
  const u64 seed = a.seed[row], prompt = a.prompt_hash[row];
  uint32_t c0 = a.candidate[row], c1 = position, c2 = (uint32_t)prompt, c3 = (uint32_t)(prompt >> 32);
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

// Sum over the lanes up to this one.
template <class T>
__device__ __forceinline__ T warp_scan(T sum) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(~0u, sum, step);
    if ((int)threadIdx.x % 32 >= step) sum += other;
  }
  return sum;
}

// Sum over the threads of the block before this one; `total` is the sum over all.
__device__ __forceinline__ u64 block_scan(u64 value, u64& total) {
  __shared__ u64 warp_totals[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u64 sum = warp_scan(value);
  __syncthreads();  // of an earlier call everybody has read the totals
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  u64 offset = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i == warp) offset = total;
    total += warp_totals[i];
  }
  return offset + sum - value;
}

// The first chunk in whose stretch of the cumulative sum of weight(chunk) the target lies, the sum before the chunk
// and the target, which target_of(sum of all) gives and which must be under that sum. All warps do the same.
template <class T>
struct Place {
  int chunk;
  T before, target;
};
template <class T, class Weight, class TargetOf>
__device__ __forceinline__ Place<T> find_chunk(int chunks, const Weight& weight, const TargetOf& target_of) {
  const int each = (chunks + 31) / 32, first = (int)threadIdx.x % 32 * each, end = min(first + each, chunks);
  T sum = 0;
  for (int chunk = first; chunk < end; ++chunk) sum += weight(chunk);
  const T through = warp_scan(sum);
  T before = __shfl_up_sync(~0u, through, 1);
  if (threadIdx.x % 32 == 0) before = 0;
  Place<T> place = {0, before, target_of(__shfl_sync(~0u, through, 31))};
  // a sum of doubles may step back by its last bit, so that two lanes claim the target: the first has it
  const bool claims = before <= place.target && place.target < through;
  const int owner = __ffs(__ballot_sync(~0u, claims)) - 1;
  // in the lane, the last chunk with weight that begins before the target
  for (int chunk = first; chunk < end; ++chunk) {
    const T mine = weight(chunk);
    if (mine > 0 && before <= place.target) place.chunk = chunk, place.before = before;
    before += mine;
  }
  place.chunk = __shfl_sync(~0u, place.chunk, owner);
  place.before = __shfl_sync(~0u, place.before, owner);
  return place;
}

// What the partials of a row come to. Sums are relative to the largest logit; `sum_1` is at least 1 unless a logit is
// NaN or +inf or all are -inf. All warps do the same.
struct RowSums {
  float largest;
  double sum_1, sum_t;  // at temperature 1, and at the row's

  __device__ __forceinline__ RowSums() {}
  __device__ __forceinline__ RowSums(const float4* parts, int chunks, float factor) : largest(kLowest) {
    const int lane = threadIdx.x % 32;
    for (int chunk = lane; chunk < chunks; chunk += 32) largest = fmaxf(largest, parts[chunk].x);
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    sum_1 = sum_t = 0.;
    for (int chunk = lane; chunk < chunks; chunk += 32) {
      const float4 part = parts[chunk];
      sum_1 += (double)part.y * exp2_fast((part.x - largest) * kLog2E);
      sum_t += (double)part.z * exp2_fast((part.x - largest) * factor);
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
      sum_1 += __shfl_xor_sync(~0u, sum_1, step);
      sum_t += __shfl_xor_sync(~0u, sum_t, step);
    }
  }
  __device__ bool usable() const { return sum_1 >= 0.5; }
};

__device__ __forceinline__ void write_result(
    const Args& a, int row, int token, float x, const RowSums& sums, double kept_sum, float temperature) {
  a.tokens[row] = token;
  // logf is right to 1e-6 here and much faster than log
  const double below = (double)x - sums.largest;
  a.logprobs[row] = (float)(below - logf((float)sums.sum_1));
  const double scaled = temperature == 1.f ? below : below / temperature;
  a.sampling_logprobs[row] = temperature == 0.f ? 0.f : (float)(scaled - logf((float)kept_sum));
}

// Calls found(token, logit) in one thread: for the token of the chunk in whose stretch of the cumulative mass, over
// tokens of at least `threshold`, `target` lies. Needs a token with mass; a target behind all of them takes the last.
template <class Line, class Found>
__device__ __forceinline__ void draw_in_chunk(
    const Line& line, int chunk, float largest, float factor, float threshold, u64 target, const Found& found) {
  constexpr int kEach = kChunk / kThreads, kPieces = kEach / Line::kSize;
  const int first = chunk * kChunk + (int)threadIdx.x * kEach;
  Piece<typename Line::scalar> pieces[kPieces];
  u64 masses[kEach], sum = 0, total;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) pieces[p] = line.piece(first + p * Line::kSize);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float x = pieces[i / Line::kSize][i % Line::kSize];
    masses[i] = x >= threshold ? mass_of(x, largest, factor) : 0;
    sum += masses[i];
  }
  u64 before = block_scan(sum, total);
  target = min(target, total - 1);
  if (before > target || target >= before + sum) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (before <= target && target < before + masses[i]) found(first + i, pieces[i / Line::kSize][i % Line::kSize]);
    before += masses[i];
  }
}

}  // namespace ember::sampling
