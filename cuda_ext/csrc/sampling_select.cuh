// Exact selection from the top without sorting.
#pragma once

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
  __device__ __forceinline__ void add(int bin, u64 weight) {
    const uint32_t part = (uint32_t)weight;
    const uint32_t carry = atomicAdd(&low[bin], part) > ~part;
    const uint32_t upper = (uint32_t)(weight >> 32) + carry;
    if (upper) atomicAdd(&high[bin], upper);
  }
  __device__ __forceinline__ u64 operator[](int bin) const { return (u64)high[bin] << 32 | low[bin]; }
};

// The largest x present such that the weights of all elements of at least x reach target_of(sum of all weights), which
// must be at least 1; -inf where they never do. Called by the whole block.
// visit(f) calls f(x) for each element, distributed over the threads; weigh(x) >= 0.
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
    visit([&](float x) {
      const uint32_t key = key_of(x);
      if (pass && (key >> fixed) != prefix) return;
      const u64 weight = weigh(x);
      if (weight) histogram.add((key >> shift) & digit_mask, weight);
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
