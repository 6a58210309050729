// Wide accesses: a thread moves up to 16 bytes at once, which is what a memory-bound kernel lives on.
#pragma once

#include "common.cuh"

namespace ember {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

// Elements of a 16-byte access.
template <class T>
constexpr int kWide = 16 / (int)sizeof(T);

template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

// Whether rows of `stride` elements that begin at `pointer` may be read `bytes` at a time; a null pointer may.
template <class T>
__host__ __device__ bool aligned(const T* pointer, int64_t stride, size_t bytes = 16) {
  return ((uintptr_t)pointer | (uintptr_t)(stride * (int64_t)sizeof(T))) % bytes == 0;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over all threads of a block whose size is a multiple of 32, in a fixed order; every thread gets it. Once a kernel.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float sums[32];
  value = warp_sum(value);
  const int lane = threadIdx.x % 32;
  if (lane == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0.0f);
}

}  // namespace ember
