// y = x W^T for few rows: how the work is cut, and the entry point.
#include <algorithm>

#include "skinny_linear.cuh"

namespace ember::skinny {

template <class T, int kHalves, int kDepth>
int run(const Problem& p, int grid, cudaStream_t stream) {
  const auto kernel = skinny_linear_kernel<T, kHalves, kDepth>;
  constexpr int kBytes = Layout<T, kHalves, kDepth>::kBytes;
  if (p.cluster == 1) return launch(kernel, dim3(grid), dim3(kThreads), kBytes, stream, p);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return (int)status;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = p.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  status = cudaLaunchKernelEx(&config, kernel, p);
  return (int)(status == cudaSuccess ? cudaGetLastError() : status);
}

template <class T>
int choose(const Problem& p, int depth, int grid, cudaStream_t stream) {
  if (p.rows > 8) return run<T, 2, 5>(p, grid, stream);
  if (depth == 4) return run<T, 1, 4>(p, grid, stream);
  if (depth == 6) return run<T, 1, 6>(p, grid, stream);
  return run<T, 1, 12>(p, grid, stream);
}

}  // namespace ember::skinny

EMBER_API int ember_skinny_linear(const void* x, const void* residual, const void* norm_weight, const void* weight,
                                  const void* bias, void* y, void* residual_out, int64_t dtype, int64_t rows,
                                  int64_t in, int64_t out, int64_t swiglu, float eps, int64_t depth, int64_t prefetch,
                                  int64_t early, int64_t evict, int64_t cluster, cudaStream_t stream) {
  using namespace ember::skinny;
  Problem p = {x, residual, norm_weight, weight, bias, y, residual_out, (int)rows, (int)in, (int)out};
  const int units = (int)((in + kUnit - 1) / kUnit);
  p.segments = (units + kSegmentUnits - 1) / kSegmentUnits;
  p.segment_units = (units + p.segments - 1) / p.segments;
  p.segments = (units + p.segment_units - 1) / p.segment_units;
  p.steps = (p.segment_units + kWarps - 1) / kWarps;
  p.swiglu = (int)swiglu;
  p.eps = eps;
  p.prefetch_tiles = (int)prefetch, p.early = (int)early, p.evict = (int)evict;
  const ember::DeviceInfo& device = ember::device_info();
  p.cluster = cluster && device.major >= 9 && p.segments <= 8 ? p.segments : 1;
  const int shares = std::max((cluster == 2 ? device.multiprocessors / 8 * 8 : device.multiprocessors) / p.cluster, 1);
  const int grid = (int)std::min<int64_t>(shares, out) * p.cluster;
  if (dtype == ember::kBFloat16) return choose<ember::bf16>(p, (int)depth, grid, stream);
  if (dtype == ember::kFloat16) return choose<ember::fp16>(p, (int)depth, grid, stream);
  return ember::fail("skinny_linear takes bfloat16 and float16, not number format %lld", (long long)dtype);
}
