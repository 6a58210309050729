// Products on Hopper's matrix units: a warpgroup of 128 threads multiplies A from its registers or shared memory with B
// from shared memory into float32 registers. PTX ISA 8.0, "Asynchronous Warpgroup Level Matrix Instructions"; on sm_90a
// only.
//
// Of d [64, N], thread t of the group holds d[4 j + 2 r + e] = row t / 32 * 16 + t % 32 / 4 + 8 r, column
// 8 j + t % 4 * 2 + e. Of A [64, 16], a[2 h + r] = the same row, columns 8 h + t % 4 * 2 and the next.
#pragma once

#include "common.cuh"

namespace ember::hopper {

// Where A or B is: in rows of 128 bytes (64 numbers), swizzled by 128 bytes, in groups of 8 rows of 1024 bytes. Where
// the summed dimension is the contiguous one, the next group is the next 8 of N (M in A), and `leading` is not used;
// where N is, it is the next 8 of the summed dimension, and `leading` bytes lead to the next 64 of N. This is the lower
// half of the unit's descriptor, in which addresses count 16 bytes; the upper half is the same for all.
__device__ __forceinline__ uint32_t operand(const void* pointer, uint32_t leading) {
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(pointer);
  return (address & 0x3FFFF) >> 4 | leading >> 4 << 16;
}

// Two numbers as an operand holds them.
__device__ __forceinline__ uint32_t pack(bf16, float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ uint32_t pack(fp16, float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving uses of the values over this place: it does not see that products run on.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Waits until at most kPending groups of products are under way; `values` is what the others wrote.
template <int kPending, int kCount>
__device__ __forceinline__ void matrix_wait(float (&values)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(values);
}

#define EMBER_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EMBER_REGISTERS_64 EMBER_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EMBER_REGISTERS_80 EMBER_REGISTERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define EMBER_REGISTERS_96 EMBER_REGISTERS_80 ", " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define EMBER_VALUES_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define EMBER_VALUES_32(d, i) \
  EMBER_VALUES_8(d, i), EMBER_VALUES_8(d, i + 8), EMBER_VALUES_8(d, i + 16), EMBER_VALUES_8(d, i + 24)
#define EMBER_VALUES_64(d, i) EMBER_VALUES_32(d, i), EMBER_VALUES_32(d, i + 32)
#define EMBER_VALUES_80(d, i) EMBER_VALUES_64(d, i), EMBER_VALUES_8(d, i + 64), EMBER_VALUES_8(d, i + 72)
#define EMBER_VALUES_96(d, i) EMBER_VALUES_64(d, i), EMBER_VALUES_32(d, i + 64)

// NAME(T, d, a, b, accumulate): d [64, N] = A [64, 16] B [16, N], added to what d was if `accumulate`. SHAPE and TYPE
// are PTX's names; N_IS_CONTIGUOUS "1" or "0" says which of B's dimensions is.
#define EMBER_MULTIPLY(NAME, T, TYPE, SHAPE, COUNT, R0, R1, R2, R3, R4, R5, N_IS_CONTIGUOUS) \
  __device__ __forceinline__ void NAME(T, float (&d)[COUNT], const uint32_t* a, uint32_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, " R5 ", 0;\nmov.b64 b, {" R4 ", 0x40000040};\n" \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" EMBER_REGISTERS_##COUNT "}, " \
                 "{" R0 ", " R1 ", " R2 ", " R3 "}, b, p, 1, 1, " N_IS_CONTIGUOUS ";\n}\n" \
                 : EMBER_VALUES_##COUNT(d, 0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate)); \
  }
#define EMBER_MULTIPLY_32(NAME, T, TYPE, N_IS_CONTIGUOUS) \
  EMBER_MULTIPLY(NAME, T, TYPE, "m64n64k16", 32, "%32", "%33", "%34", "%35", "%36", "%37", N_IS_CONTIGUOUS)
#define EMBER_MULTIPLY_64(NAME, T, TYPE, N_IS_CONTIGUOUS) \
  EMBER_MULTIPLY(NAME, T, TYPE, "m64n128k16", 64, "%64", "%65", "%66", "%67", "%68", "%69", N_IS_CONTIGUOUS)

EMBER_MULTIPLY_32(multiply, bf16, "bf16", "1")
EMBER_MULTIPLY_64(multiply, bf16, "bf16", "1")
EMBER_MULTIPLY_32(multiply, fp16, "f16", "1")
EMBER_MULTIPLY_64(multiply, fp16, "f16", "1")
EMBER_MULTIPLY_32(multiply_transposed, bf16, "bf16", "0")
EMBER_MULTIPLY_64(multiply_transposed, bf16, "bf16", "0")
EMBER_MULTIPLY_32(multiply_transposed, fp16, "f16", "0")
EMBER_MULTIPLY_64(multiply_transposed, fp16, "f16", "0")

// As before with A in shared memory too; both in rows along the summed dimension.
#define EMBER_MULTIPLY_SHARED(T, TYPE, SHAPE, COUNT, R0, R1, R2) \
  __device__ __forceinline__ void multiply_shared(T, float (&d)[COUNT], uint32_t a, uint32_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, " R2 ", 0;\n" \
                 "mov.b64 a, {" R0 ", 0x40000040};\nmov.b64 b, {" R1 ", 0x40000040};\n" \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" EMBER_REGISTERS_##COUNT "}, " \
                 "a, b, p, 1, 1, 0, 0;\n}\n" \
                 : EMBER_VALUES_##COUNT(d, 0) \
                 : "r"(a), "r"(b), "r"(accumulate)); \
  }
#define EMBER_MULTIPLY_SHARED_ALL(T, TYPE) \
  EMBER_MULTIPLY_SHARED(T, TYPE, "m64n128k16", 64, "%64", "%65", "%66") \
  EMBER_MULTIPLY_SHARED(T, TYPE, "m64n160k16", 80, "%80", "%81", "%82") \
  EMBER_MULTIPLY_SHARED(T, TYPE, "m64n192k16", 96, "%96", "%97", "%98")

EMBER_MULTIPLY_SHARED_ALL(bf16, "bf16")
EMBER_MULTIPLY_SHARED_ALL(fp16, "f16")

#undef EMBER_MULTIPLY_SHARED_ALL
#undef EMBER_MULTIPLY_SHARED
#undef EMBER_MULTIPLY_64
#undef EMBER_MULTIPLY_32
#undef EMBER_MULTIPLY
#undef EMBER_VALUES_96
#undef EMBER_VALUES_80
#undef EMBER_VALUES_64
#undef EMBER_VALUES_32
#undef EMBER_VALUES_8
#undef EMBER_REGISTERS_96
#undef EMBER_REGISTERS_80
#undef EMBER_REGISTERS_64
#undef EMBER_REGISTERS_32

}  // namespace ember::hopper
