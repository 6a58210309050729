// The host's side of Hopper: tensors described to the copy engine (CUDA Driver API, "Tensor Map Object Management"),
// and kernels launched in clusters of blocks.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace ember {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, asked for at run time: the library is not linked to the driver. Null where it is too old.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? (EncodeTensorMap)function : nullptr;
  }();
  return found;
}

// A tensor of 2-byte numbers, its fastest dimension first; `strides` of the others in elements. Boxes of it go to
// shared memory in rows of 64 numbers, swizzled by 128 bytes. False where the driver refuses.
inline bool describe(CUtensorMap* map, const void* data, int64_t dtype, const int64_t (&sizes)[3],
                     const int64_t (&strides)[2], const int (&box)[3]) {
  const cuuint64_t size[3] = {(cuuint64_t)sizes[0], (cuuint64_t)sizes[1], (cuuint64_t)sizes[2]};
  const cuuint64_t stride[2] = {(cuuint64_t)strides[0] * 2, (cuuint64_t)strides[1] * 2};
  const cuuint32_t extent[3] = {(cuuint32_t)box[0], (cuuint32_t)box[1], (cuuint32_t)box[2]}, steps[3] = {1, 1, 1};
  const auto type = dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map_encoder()(map, type, 3, const_cast<void*>(data), size, stride, extent, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// As launch(); `cluster` consecutive blocks run at once and may reach each other's shared memory.
template <class... Params, class... Args>
int launch_clusters(int cluster, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Args... args) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
  if (status != cudaSuccess) return (int)status;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {(unsigned)cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  status = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  return (int)(status == cudaSuccess ? cudaGetLastError() : status);
}

}  // namespace ember
