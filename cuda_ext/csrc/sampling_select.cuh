// Exact selection from the top without sorting.
#pragma once

#include <type_traits>

#include "sampling.cuh"

namespace ember::sampling {

constexpr int kBins = 2048;
constexpr int kDigits = 11;  // bits a pass

// Unsigned integers in the order of the floats.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ __forceinline__ float float_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// 64-bit sums in two halves, as shared memory adds 32 bits at a time; sums of integers do not depend on their order.
struct Histogram {
  uint32_t low[kBins], high[kBins];

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) low[i] = high[i] = 0;
  }
  __device__ __forceinline__ u64 operator[](int bin) const { return (u64)high[bin] << 32 | low[bin]; }
};

// One number in the place of a piece.
struct Single {
  static constexpr int kSize = 1;
  float x;
  __device__ __forceinline__ float operator[](int) const { return x; }
};

// The largest x present such that the weights of all elements of at least x reach target_of(sum of all weights), which
// must be at least 1; -inf where they never do. Called by the whole block.
// visit(f) calls f(piece) for all pieces, distributed over the threads; weigh(x) >= 0.
// scalar: the format the elements came in; of bfloat16 and float16, 22 bits of the key tell all.
template <class scalar, class Visit, class Weigh, class TargetOf>
__device__ __forceinline__ float select_from_top(
    Histogram& histogram, const Visit& visit, const Weigh& weigh, const TargetOf& target_of) {
  constexpr int kPasses = sizeof(scalar) == 2 ? 2 : 3;
  constexpr int kEach = kBins / kThreads;
  __shared__ int found;
  __shared__ u64 found_above;
  uint32_t prefix = 0;
  u64 target = 0, above = 0;
  int shift = 32;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int digits = min(kDigits, shift), fixed = shift;
    shift -= digits;
    const uint32_t digit_mask = (1u << digits) - 1;
    histogram.clear();
    if (threadIdx.x == 0) found = -1;
    __syncthreads();
    visit([&](const auto& piece) {
      constexpr int kSize = std::remove_reference_t<decltype(piece)>::kSize;
      constexpr int kTogether = kSize < 2 ? kSize : 2;  // sums that are on their way back from shared memory
#pragma unroll
      for (int first = 0; first < kSize; first += kTogether) {
        u64 weights[kTogether];
        uint32_t bins[kTogether], before[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const float x = piece[first + i];
          const uint32_t key = key_of(x);
          weights[i] = pass == 0 || (key >> fixed) == prefix ? weigh(x) : 0;
          bins[i] = (key >> shift) & digit_mask;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          before[i] = 0;
          if (weights[i]) before[i] = atomicAdd(&histogram.low[bins[i]], (uint32_t)weights[i]);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const uint32_t upper = (uint32_t)(weights[i] >> 32) + (before[i] > ~(uint32_t)weights[i]);
          if (upper) atomicAdd(&histogram.high[bins[i]], upper);
        }
      }
    });
    __syncthreads();
    const int top = kBins - 1 - (int)threadIdx.x * kEach;
    u64 sum = 0, total;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += histogram[top - i];
    u64 before = above + block_scan(sum, total);
    if (pass == 0) target = target_of(total);
    if (before < target && target <= before + sum) {
#pragma unroll 1
      for (int i = 0; i < kEach; ++i) {
        const u64 weight = histogram[top - i];
        if (before < target && target <= before + weight) found = top - i, found_above = before;
        before += weight;
      }
    }
    __syncthreads();
    if (found < 0) return -INFINITY;
    prefix = prefix << digits | found;
    above = found_above;
    __syncthreads();
  }
  if (shift == 0) return float_of(prefix);
  // the bits left are zeros of the float, in negative keys ones
  return float_of(prefix << shift | (prefix >> (31 - shift) ? 0u : (1u << shift) - 1));
}

// The lowest float whose quotient by the temperature rounds to at least `floor`. Filters compare quotients as they
// round; comparing logits with this gives the same answer.
__device__ __forceinline__ float lowest_with_quotient(float floor, float temperature, float guess) {
  if (!(floor > -INFINITY)) return -INFINITY;
  float x = guess;
#pragma unroll 1
  for (int i = 0; i < 64 && __fdiv_rn(x, temperature) >= floor; ++i) x = nextafterf(x, -INFINITY);
#pragma unroll 1
  for (int i = 0; i < 64 && __fdiv_rn(x, temperature) < floor; ++i) x = nextafterf(x, INFINITY);
  return x;
}

}  // namespace ember::sampling
