// What all kernels share: number formats, launches, and how a fault reaches Python.
//
// Every entry point is a C function `int ember_<name>(pointers, int64_t sizes, float scalars, cudaStream_t stream)`,
// so that the library knows neither Python nor torch and one build serves all versions of both. It returns 0, a
// cudaError_t, or -1 with a sentence in ember_error_text().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#define EMBER_API extern "C" __attribute__((visibility("default")))

namespace ember {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Codes of number formats as Python passes them (cuda_ext/library.py).
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

char* error_buffer();  // library.cu; 512 bytes a thread

template <class... Args>
int fail(const char* format, Args... args) {
  snprintf(error_buffer(), 512, format, args...);
  return -1;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

// Programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization").
// A kernel started by launch() may begin while its predecessor still runs: it must call wait_for_predecessor() in
// every thread before it reads what another kernel wrote and before it writes anything at all. Constant weights may
// be read before. Kernels call let_successor_start() as early as they can.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

struct DeviceInfo {
  int major, minor, multiprocessors, shared_bytes;
};
const DeviceInfo& device_info();  // library.cu; of the current device

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  if (shared_bytes > 48 * 1024) {
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (status != cudaSuccess) return (int)status;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device_info().major >= 9 ? 1 : 0;
  cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  return (int)(status == cudaSuccess ? cudaGetLastError() : status);
}

}  // namespace ember

// Calls BODY with `scalar` defined as the C++ type of a Dtype; leaves the function with an error for others.
#define EMBER_DISPATCH(DTYPE, ...)                                    \
  switch (DTYPE) {                                                    \
    case ember::kFloat32: { using scalar = float; __VA_ARGS__; break; }       \
    case ember::kBFloat16: { using scalar = ember::bf16; __VA_ARGS__; break; } \
    case ember::kFloat16: { using scalar = ember::fp16; __VA_ARGS__; break; }  \
    default: return ember::fail("number format %lld is not known", (long long)(DTYPE)); \
  }
