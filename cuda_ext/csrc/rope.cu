// One pass over qkv: q and k are normed per head and rotated, q goes out, k and v go to their slots of the cache.
//
// A head's first and second half rotate against each other (Su et al. 2021, section 3.4.2, halves instead of pairs),
// so a thread holds kWidth elements of the first half and the same of the second; the threads of a head sum their
// squares by shuffles.
#include "vector.cuh"

namespace ember {

template <class T>
struct RopeWrite {
  const T* qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim]
  int64_t qkv_stride;
  const T *q_weight, *k_weight;  // [head_dim]
  float eps;
  const float* table;        // [positions, 2, head_dim / 2]
  const int64_t *positions, *slots;  // [tokens]
  T* q;                      // [tokens, heads, head_dim]
  T *k_cache, *v_cache;      // [slots, kv_heads, head_dim]
  int64_t k_stride, v_stride;  // elements between slots
  int heads, kv_heads, head_dim;
  float inverse_dim;
  int group_shift;  // log2 of the threads of a head
};

// A head's normed pieces of a thread against each other, in float32. The products are rounded one by one, as torch
// does, so that 16-bit results equal the reference's.
template <class T, int kWidth>
__device__ __forceinline__ void rotate(Vector<T, kWidth>& first, Vector<T, kWidth>& second,
                                       const float (&cosine)[kWidth], const float (&sine)[kWidth]) {
  auto a = unpack(first), b = unpack(second);
#pragma unroll
  for (int i = 0; i < kWidth; i++) {
    const float x = a[i], y = b[i];
    a[i] = __fsub_rn(__fmul_rn(x, cosine[i]), __fmul_rn(y, sine[i]));
    b[i] = __fadd_rn(__fmul_rn(y, cosine[i]), __fmul_rn(x, sine[i]));
  }
  first = pack<T, kWidth>(a);
  second = pack<T, kWidth>(b);
}

template <int kWidth>
__device__ __forceinline__ void load_floats(float (&to)[kWidth], const float* from) {
#pragma unroll
  for (int i = 0; i < kWidth; i += 4) {
    const auto four = unpack(load_vector<4>(from + i));
#pragma unroll
    for (int j = 0; j < 4; j++) to[i + j] = four[j];
  }
}

// Heads of a thread, which share the cosines and sines. On an H200, two take 61 instead of 65 us at 8192 tokens, but 1.7
// instead of 1.5 at one and 7.4 instead of 6.8 at 800: decode steps count more.
constexpr int kHeadsEach = 1;
constexpr unsigned kFewTokens = 8;

template <class T, int kWidth>
__global__ void __launch_bounds__(512) rope_write_kernel(const RopeWrite<T> op) {
  const int64_t token = blockIdx.x;
  const int group = (int)(blockIdx.y * (blockDim.x >> op.group_shift) + (threadIdx.x >> op.group_shift));
  const int half = op.head_dim / 2, at = (threadIdx.x & ((1 << op.group_shift) - 1)) * kWidth;
  const int first_v = op.heads + op.kv_heads, all = first_v + op.kv_heads;
  Vector<T, kWidth> first[kHeadsEach], second[kHeadsEach], weight_first[kHeadsEach], weight_second[kHeadsEach];
  bool active[kHeadsEach];
#pragma unroll
  for (int i = 0; i < kHeadsEach; i++) {
    const int head = group * kHeadsEach + i;
    active[i] = head < all && at < half;
    if (active[i] && head < first_v) {
      const T* weight = (head < op.heads ? op.q_weight : op.k_weight) + at;
      weight_first[i] = load_vector<kWidth>(weight);
      weight_second[i] = load_vector<kWidth>(weight + half);
    }
  }
  // In a step of few tokens attention asks for the prompt's K and V meanwhile: on an H200 a step of Qwen3-4B takes 2.66
  // instead of 2.71 ms at one token, 3.00 instead of 3.03 at 8.
  const bool few_tokens = gridDim.x <= kFewTokens;
  if (few_tokens) let_successor_start();
  wait_for_predecessor();
  if (!few_tokens) let_successor_start();
  float cosine[kWidth], sine[kWidth], squares[kHeadsEach];
  const int64_t position = op.positions[token], slot = op.slots[token];
#pragma unroll
  for (int i = 0; i < kHeadsEach; i++) {
    if (!active[i]) continue;
    const T* from = op.qkv + token * op.qkv_stride + (group * kHeadsEach + i) * op.head_dim + at;
    first[i] = load_vector<kWidth>(from);
    second[i] = load_vector<kWidth>(from + half);
  }
  if (active[0] && group * kHeadsEach < first_v) {
    const float* row = op.table + position * op.head_dim + at;
    load_floats(cosine, row);
    load_floats(sine, row + half);
  }
#pragma unroll
  for (int i = 0; i < kHeadsEach; i++) {
    squares[i] = active[i] ? sum_of_squares(first[i]) + sum_of_squares(second[i]) : 0.0f;
  }
  for (int offset = 1 << op.group_shift >> 1; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kHeadsEach; i++) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], offset);
  }
#pragma unroll
  for (int i = 0; i < kHeadsEach; i++) {
    const int head = group * kHeadsEach + i;
    if (!active[i]) continue;
    if (head < first_v) {
      const float factor = rsqrtf(squares[i] * op.inverse_dim + op.eps);
      first[i] = normalize(first[i], factor, weight_first[i]);
      second[i] = normalize(second[i], factor, weight_second[i]);
      rotate(first[i], second[i], cosine, sine);
    }
    T* to = head < op.heads ? op.q + (token * op.heads + head) * op.head_dim
            : head < first_v ? op.k_cache + slot * op.k_stride + (head - op.heads) * op.head_dim
                             : op.v_cache + slot * op.v_stride + (head - first_v) * op.head_dim;
    store_vector(to + at, first[i]);
    store_vector(to + at + half, second[i]);
  }
}

template <class T, int kWidth>
int launch_rope_write(RopeWrite<T> op, int64_t tokens, cudaStream_t stream) {
  const int64_t groups = ceil_div(op.heads + 2 * op.kv_heads, kHeadsEach);
  while ((1 << op.group_shift) * kWidth * 2 < op.head_dim) op.group_shift++;
  const int64_t threads = round_up(groups << op.group_shift, 32);
  const dim3 block((unsigned)(threads < 512 ? threads : 512));
  const dim3 grid((unsigned)tokens, (unsigned)ceil_div(groups, block.x >> op.group_shift));
  return launch(rope_write_kernel<T, kWidth>, grid, block, 0, stream, op);
}

}  // namespace ember

// Shapes as in the struct above; strides in elements. head_dim is a multiple of 8 up to 256.
EMBER_API int ember_qk_norm_rope_write(const void* qkv, int64_t qkv_stride, const void* q_weight, const void* k_weight,
                                       float eps, const void* table, const void* positions, void* k_cache,
                                       int64_t k_stride, void* v_cache, int64_t v_stride, const void* slots, void* q,
                                       int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                       int64_t dtype, cudaStream_t stream) {
  using namespace ember;
  EMBER_DISPATCH(dtype, {
    RopeWrite<scalar> op = {(const scalar*)qkv,
                            qkv_stride,
                            (const scalar*)q_weight,
                            (const scalar*)k_weight,
                            eps,
                            (const float*)table,
                            (const int64_t*)positions,
                            (const int64_t*)slots,
                            (scalar*)q,
                            (scalar*)k_cache,
                            (scalar*)v_cache,
                            k_stride,
                            v_stride,
                            (int)heads,
                            (int)kv_heads,
                            (int)head_dim,
                            1.0f / (float)head_dim,
                            0};
    if (kWide<scalar> == 8 && head_dim % 16 == 0) return launch_rope_write<scalar, kWide<scalar>>(op, tokens, stream);
    return launch_rope_write<scalar, 4>(op, tokens, stream);
  })
  return 0;
}
