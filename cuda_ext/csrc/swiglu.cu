// silu(gate) * up of rows [gate | up]; silu is rounded to its type first, as the torch reference does.
#include "vector.cuh"

namespace ember {

// 16-bit types need no more than the fast exponential and quotient: their own rounding is a thousand times coarser.
__device__ __forceinline__ float silu(float gate, float) { return gate / (1.0f + expf(-gate)); }
template <class T>
__device__ __forceinline__ float silu(float gate, T) { return __fdividef(gate, 1.0f + __expf(-gate)); }

constexpr int kSwigluThreads = 256;

// A block takes one chunk of kSwigluThreads pieces of kWidth elements of a row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_kernel(const T* gate_up, int64_t stride, T* out, int64_t ffn, int chunks) {
  const int64_t row = blockIdx.x / chunks;
  const int64_t column = ((int64_t)(blockIdx.x % chunks) * kSwigluThreads + threadIdx.x) * kWidth;
  wait_for_predecessor();
  let_successor_start();
  if (column >= ffn) return;
  const T* from = gate_up + row * stride + column;
  const auto gate = load_vector<kWidth>(from), up = load_vector<kWidth>(from + ffn);
  auto activated = unpack(gate);
#pragma unroll
  for (int i = 0; i < kWidth; i++) activated[i] = silu(activated[i], T{});
  store_vector(out + row * ffn + column, multiply(pack<T, kWidth>(activated), up));
}

}  // namespace ember

// gate_up: [tokens, 2 * ffn] with `stride` elements between rows; out: [tokens, ffn].
EMBER_API int ember_swiglu(const void* gate_up, int64_t stride, void* out, int64_t tokens, int64_t ffn, int64_t dtype,
                           cudaStream_t stream) {
  EMBER_DISPATCH(dtype, {
    constexpr int kWidth = ember::kWide<scalar>;
    const auto* from = (const scalar*)gate_up;
    auto* to = (scalar*)out;
    const bool wide = ffn % kWidth == 0 && ember::aligned(from, stride) && ember::aligned(to, 0);
    const int64_t chunks = ember::ceil_div(ffn, ember::kSwigluThreads * (wide ? kWidth : 1));
    const dim3 grid((unsigned)(tokens * chunks)), block(ember::kSwigluThreads);
    const auto kernel = wide ? ember::swiglu_kernel<scalar, kWidth> : ember::swiglu_kernel<scalar, 1>;
    return ember::launch(kernel, grid, block, 0, stream, from, stride, to, ffn, (int)chunks);
  })
  return 0;
}
