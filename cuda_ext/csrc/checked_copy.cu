// Pieces of memory copied into one flat tensor, cast on the way, and what was written looked at in the same pass: how
// many values of each piece are not finite, and a checksum of its bits.
#include "vector.cuh"

namespace ember {

struct CopyPiece {
  int64_t from;          // bytes behind `base`; an address where base is null
  int64_t first, count;  // elements of `to`
};

constexpr int kCopyThreads = 256;
constexpr int kCopyBlocks = 8;    // a piece
constexpr int kCopyWidth = 8;     // elements of a thread's step
constexpr int kCopyInFlight = 4;  // steps loaded at once

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(bf16 x) { return bits_as<uint16_t>(x); }
__device__ __forceinline__ uint32_t bits_of(fp16 x) { return bits_as<uint16_t>(x); }

struct Seen {
  unsigned long long not_finite = 0, checksum = 0;
  template <class T>
  __device__ __forceinline__ void look(T value, int64_t place) {
    not_finite += !isfinite(to_float(value));
    checksum += (unsigned long long)bits_of(value) * (2 * (unsigned long long)place + 1);
  }
};

template <class T>
struct alignas(16) Step {
  T values[kCopyWidth];
};

template <class From, class To>
__device__ __forceinline__ To cast(From value) {
  if constexpr (__is_same(From, To)) {
    return value;
  } else {
    return from_float<To>(to_float(value));
  }
}

// blockIdx.y: a piece; blockIdx.x: every kCopyBlocks-th part of it.
template <class From, class To>
__global__ void __launch_bounds__(kCopyThreads)
    checked_copy_kernel(To* to, const char* base, const CopyPiece* pieces, unsigned long long* seen_by_piece) {
  wait_for_predecessor();
  let_successor_start();
  const CopyPiece piece = pieces[blockIdx.y];
  const From* from = reinterpret_cast<const From*>(base + piece.from);
  To* out = to + piece.first;
  Seen seen;
  const bool whole = (uintptr_t)from % 16 == 0 && (uintptr_t)out % 16 == 0;
  const int64_t steps = whole ? piece.count / kCopyWidth : 0, stride = (int64_t)gridDim.x * kCopyThreads;
  for (int64_t step = blockIdx.x * kCopyThreads + threadIdx.x; step < steps; step += stride * kCopyInFlight) {
    Step<From> loaded[kCopyInFlight];
#pragma unroll
    for (int i = 0; i < kCopyInFlight; i++) {
      if (step + i * stride < steps) loaded[i] = reinterpret_cast<const Step<From>*>(from)[step + i * stride];
    }
#pragma unroll
    for (int i = 0; i < kCopyInFlight; i++) {
      const int64_t at = step + i * stride;
      if (at >= steps) continue;
      Step<To> eight;
#pragma unroll
      for (int j = 0; j < kCopyWidth; j++) {
        eight.values[j] = cast<From, To>(loaded[i].values[j]);
        seen.look(eight.values[j], at * kCopyWidth + j);
      }
      reinterpret_cast<Step<To>*>(out)[at] = eight;
    }
  }
  for (int64_t at = steps * kCopyWidth + blockIdx.x * kCopyThreads + threadIdx.x; at < piece.count; at += stride) {
    const To value = cast<From, To>(from[at]);
    seen.look(value, at);
    out[at] = value;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    seen.not_finite += __shfl_down_sync(0xffffffffu, seen.not_finite, offset);
    seen.checksum += __shfl_down_sync(0xffffffffu, seen.checksum, offset);
  }
  if (threadIdx.x % 32 == 0) {
    if (seen.not_finite) atomicAdd(seen_by_piece + 2 * blockIdx.y, seen.not_finite);
    if (seen.checksum) atomicAdd(seen_by_piece + 2 * blockIdx.y + 1, seen.checksum);
  }
}

template <class From>
int launch_checked_copy(void* to, const void* base, const void* pieces, int64_t count, void* seen, int64_t to_dtype,
                        cudaStream_t stream) {
  const dim3 grid(kCopyBlocks, (unsigned)count), block(kCopyThreads);
  EMBER_DISPATCH(to_dtype, {
    return launch(checked_copy_kernel<From, scalar>, grid, block, 0, stream, (scalar*)to, (const char*)base,
                  (const CopyPiece*)pieces, (unsigned long long*)seen);
  })
  return 0;
}

}  // namespace ember

// pieces: [count, 3] int64 in device memory; seen: [count, 2] int64, zeros before. `to` and what is read do not overlap.
EMBER_API int ember_checked_copy(void* to, const void* base, const void* pieces, int64_t count, void* seen,
                                 int64_t from_dtype, int64_t to_dtype, cudaStream_t stream) {
  using namespace ember;
  if (count > 65535) return fail("%lld pieces, at most 65535 are possible", (long long)count);
  EMBER_DISPATCH(from_dtype, { return launch_checked_copy<scalar>(to, base, pieces, count, seen, to_dtype, stream); })
  return 0;
}
