// The library itself: errors, device facts, and a kernel to find out whether the build fits the GPU.
#include "common.cuh"

namespace ember {

char* error_buffer() {
  static thread_local char buffer[512];
  return buffer;
}

const DeviceInfo& device_info() {
  static DeviceInfo known[64];
  int device = 0;
  cudaGetDevice(&device);
  DeviceInfo& info = known[device & 63];
  if (info.major == 0) {
    cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&info.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&info.minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&info.major, cudaDevAttrComputeCapabilityMajor, device);
  }
  return info;
}

__global__ void probe_kernel(int* answer) { *answer = 42; }

}  // namespace ember

EMBER_API const char* ember_error_text() { return ember::error_buffer(); }

EMBER_API const char* ember_cuda_error_text(int status) { return cudaGetErrorString((cudaError_t)status); }

#define EMBER_TEXT_OF(...) #__VA_ARGS__
#define EMBER_TEXT(...) EMBER_TEXT_OF(__VA_ARGS__)

// The architectures it holds machine code for, times ten, separated by commas ("800,860"); 90 and 90a are both 900.
EMBER_API const char* ember_built_for() { return EMBER_TEXT(__CUDA_ARCH_LIST__); }

// The CUDA version it was built with: 13000 for 13.0.
EMBER_API int ember_runtime_version() { return CUDART_VERSION; }

// Writes 42 to a device int; cudaErrorNoKernelImageForDevice says that the build does not fit the GPU.
EMBER_API int ember_probe(int* answer, cudaStream_t stream) {
  ember::probe_kernel<<<1, 1, 0, stream>>>(answer);
  return (int)cudaGetLastError();
}
