// Log-probabilities of given tokens: each wanted line of logits is read once, nothing is written but the results.
#include <math.h>

#include "common.cuh"

namespace ember {
namespace {

constexpr int kThreads = 512;

// A running log-sum-exp: the sum of exp(x - top) over what was seen.
struct Sum {
  float top, sum;
};

__device__ __forceinline__ Sum joined(Sum a, Sum b) {
  float top = fmaxf(a.top, b.top);
  if (top == -INFINITY) return {top, 0.f};
  return {top, a.sum * __expf(a.top - top) + b.sum * __expf(b.top - top)};
}

template <class T>
__device__ __forceinline__ void add(Sum& sum, T logit) {
  float x = to_float(logit);
  if (x > sum.top) {
    sum.sum = sum.sum * __expf(sum.top - x) + 1.f;
    sum.top = x;
  } else if (x != -INFINITY) {
    sum.sum += __expf(x - sum.top);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_kernel(const T* __restrict__ logits, int64_t vocab, const int64_t* __restrict__ lines,
                          const int64_t* __restrict__ tokens, float* __restrict__ out) {
  constexpr int kWidth = 16 / sizeof(T);
  wait_for_predecessor();
  let_successor_start();
  const T* line = logits + lines[blockIdx.x] * vocab;
  // lines begin anywhere: single elements up to the first 16-byte boundary and behind the last one
  int64_t head = ((16 - reinterpret_cast<uintptr_t>(line) % 16) % 16) / sizeof(T);
  head = head < vocab ? head : vocab;
  int64_t vectors = (vocab - head) / kWidth;
  int64_t tail = head + vectors * kWidth;
  Sum sum = {-INFINITY, 0.f};
  bool bad = false;  // a NaN would be lost in comparisons
  auto take = [&](T logit) {
    float x = to_float(logit);
    bad |= !(x < INFINITY);
    add(sum, logit);
  };
  for (int64_t i = threadIdx.x; i < head; i += kThreads) take(line[i]);
  const uint4* body = reinterpret_cast<const uint4*>(line + head);
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    uint4 raw = __ldg(body + i);
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) take(values[j]);
  }
  for (int64_t i = tail + threadIdx.x; i < vocab; i += kThreads) take(line[i]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    Sum other = {__shfl_xor_sync(~0u, sum.top, offset), __shfl_xor_sync(~0u, sum.sum, offset)};
    sum = joined(sum, other);
  }
  __shared__ Sum warps[kThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    sum = warps[0];
    for (int warp = 1; warp < kThreads / 32; ++warp) sum = joined(sum, warps[warp]);
    float logit = to_float(line[tokens[blockIdx.x]]);
    out[blockIdx.x] = bad ? NAN : logit - sum.top - logf(sum.sum);
  }
}

}  // namespace
}  // namespace ember

EMBER_API int ember_token_logprobs(float* out, const void* logits, const int64_t* lines, const int64_t* tokens,
                                   int64_t count, int64_t vocab, int64_t dtype, cudaStream_t stream) {
  EMBER_DISPATCH(dtype, return ember::launch(ember::token_logprobs_kernel<scalar>, dim3(count), dim3(ember::kThreads),
                                             0, stream, static_cast<const scalar*>(logits), vocab, lines, tokens, out))
}
