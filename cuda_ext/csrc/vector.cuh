// Wide accesses and packed arithmetic: what a memory-bound kernel lives on.
#pragma once

#include <string.h>

#include "common.cuh"

namespace ember {

// kCount elements in registers as they lie in memory, up to 16 bytes. A single 16-bit element is the lower half of a word.
template <class T, int kCount>
struct Vector {
  static constexpr int kBytes = (int)sizeof(T) * kCount;
  static constexpr int kWords = (kBytes + 3) / 4;
  uint32_t words[kWords];
};

// Elements of a 16-byte access.
template <class T>
constexpr int kWide = 16 / (int)sizeof(T);

template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
  constexpr int kBytes = Vector<T, kCount>::kBytes;
  if constexpr (kBytes == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    return {{raw.x, raw.y, raw.z, raw.w}};
  } else if constexpr (kBytes == 8) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    return {{raw.x, raw.y}};
  } else if constexpr (kBytes == 4) {
    return {{*reinterpret_cast<const uint32_t*>(from)}};
  } else {
    static_assert(kBytes == 2, "2, 4, 8 or 16 bytes are one access");
    return {{*reinterpret_cast<const uint16_t*>(from)}};
  }
}

// To global memory. It says in PTX what the compiler does not always see: that this is one store.
template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& vector) {
  constexpr int kBytes = Vector<T, kCount>::kBytes;
  const size_t address = __cvta_generic_to_global(to);
  const uint32_t* words = vector.words;
  if constexpr (kBytes == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else {
    static_assert(kBytes == 2, "2, 4, 8 or 16 bytes are one access");
    *reinterpret_cast<uint16_t*>(to) = (uint16_t)words[0];
  }
}

// Arithmetic on one word. Products and sums of two 16-bit numbers are rounded once; going through float32 gives the
// same, since its 24 digits are at least 2 * 11 + 2 (Figueroa 1995).
template <class T>
struct Word;
template <>
struct Word<float> {
  static constexpr int kCount = 1;
  static __device__ __forceinline__ void unpack(uint32_t word, float* to) { to[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t pack(const float* from) { return __float_as_uint(from[0]); }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return __float_as_uint(__fmul_rn(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    return __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(b)));
  }
};
template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "only a change of type");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
template <>
struct Word<bf16> {
  static constexpr int kCount = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* to) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* from) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(from[0], from[1]));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmul2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hadd2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
};
template <>
struct Word<fp16> {
  static constexpr int kCount = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* to) {
    const float2 pair = __half22float2(bits_as<__half2>(word));
    to[0] = pair.x;
    to[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float* from) {
    return bits_as<uint32_t>(__floats2half2_rn(from[0], from[1]));
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmul2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hadd2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
};

// A vector's elements as float32; `to` has room for whole words.
template <class T, int kCount>
struct Floats {
  float values[Vector<T, kCount>::kWords * Word<T>::kCount];
  __device__ __forceinline__ float& operator[](int i) { return values[i]; }
  __device__ __forceinline__ float operator[](int i) const { return values[i]; }
};

template <class T, int kCount>
__device__ __forceinline__ Floats<T, kCount> unpack(const Vector<T, kCount>& vector) {
  Floats<T, kCount> floats;
#pragma unroll
  for (int i = 0; i < vector.kWords; i++) Word<T>::unpack(vector.words[i], floats.values + i * Word<T>::kCount);
  return floats;
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> pack(const Floats<T, kCount>& floats) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < vector.kWords; i++) vector.words[i] = Word<T>::pack(floats.values + i * Word<T>::kCount);
  return vector;
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> multiply(const Vector<T, kCount>& a, const Vector<T, kCount>& b) {
  Vector<T, kCount> result;
#pragma unroll
  for (int i = 0; i < result.kWords; i++) result.words[i] = Word<T>::multiply(a.words[i], b.words[i]);
  return result;
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> add(const Vector<T, kCount>& a, const Vector<T, kCount>& b) {
  Vector<T, kCount> result;
#pragma unroll
  for (int i = 0; i < result.kWords; i++) result.words[i] = Word<T>::add(a.words[i], b.words[i]);
  return result;
}

template <class T, int kCount>
__device__ __forceinline__ float sum_of_squares(const Vector<T, kCount>& vector) {
  const auto floats = unpack(vector);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; i++) sum += floats[i] * floats[i];
  return sum;
}

// weight * (x * factor), rounded after each product: the end of an RMSNorm as the torch reference rounds it.
template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> normalize(const Vector<T, kCount>& x, float factor,
                                                       const Vector<T, kCount>& weight) {
  auto floats = unpack(x);
#pragma unroll
  for (int i = 0; i < kCount; i++) floats[i] *= factor;
  return multiply(pack<T, kCount>(floats), weight);
}

// Whether rows of `stride` elements that begin at `pointer` may be accessed `bytes` at a time; a null pointer may.
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
