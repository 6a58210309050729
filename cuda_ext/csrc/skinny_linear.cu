// y = x W^T for few rows: how the work is cut, and the entry points.
#include <algorithm>

#include "skinny_linear.cuh"

namespace ember::skinny {

template <class T, int kHalves, int kDepth>
int run(const Chain& chain, int grid, cudaStream_t stream) {
  const auto kernel = skinny_linear_kernel<T, kHalves, kDepth>;
  constexpr int kBytes = Layout<T, kHalves, kDepth>::kBytes;
  const int cluster = chain.problems[0].cluster;
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (cluster == 1) return launch(kernel, dim3(grid), dim3(kThreads), kBytes, stream, chain);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return (int)status;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  status = cudaLaunchKernelEx(&config, kernel, chain);
  return (int)(status == cudaSuccess ? cudaGetLastError() : status);
}

template <class T>
int choose(const Chain& chain, int depth, int grid, cudaStream_t stream) {
  if (chain.problems[0].rows > 8) return run<T, 2, 5>(chain, grid, stream);
  return depth == 4 ? run<T, 1, 4>(chain, grid, stream) : run<T, 1, 6>(chain, grid, stream);
}

int choose(int64_t dtype, const Chain& chain, int depth, int grid, cudaStream_t stream) {
  if (dtype == kBFloat16) return choose<bf16>(chain, depth, grid, stream);
  if (dtype == kFloat16) return choose<fp16>(chain, depth, grid, stream);
  return fail("skinny_linear takes bfloat16 and float16, not number format %lld", (long long)dtype);
}

// Cuts the weight's width into segments whose x a CTA can hold, and its rows into a share for each CTA or cluster.
void cut(Problem& p, bool clusters, int multiprocessors) {
  const int units = (p.in + kUnit - 1) / kUnit;
  const int least = (units + kSegmentUnits - 1) / kSegmentUnits;
  p.segment_units = (units + least - 1) / least;
  p.segments = (units + p.segment_units - 1) / p.segment_units;
  p.steps = (p.segment_units + kWarps - 1) / kWarps;
  p.cluster = clusters && p.segments <= 8 ? p.segments : 1;
  const int shares = multiprocessors / p.cluster;
  p.share_rows = p.out / shares;
  p.longer_shares = p.out % shares;
  const int longest = p.share_rows + (p.longer_shares ? 1 : 0);
  const int full = p.swiglu ? kTileRows / 2 : kTileRows;
  const int tiles = (longest + full - 1) / full;
  p.tile_rows = (longest + tiles - 1) / tiles;
  p.tiles_per_block = p.segments == 1 ? tiles : std::min(tiles, kBlockTiles);
  p.block_rows = p.segments == 1 ? p.out : kBlockTiles * p.tile_rows;
}

}  // namespace ember::skinny

EMBER_API int ember_skinny_linear(const void* x, const void* residual, const void* norm_weight, const void* weight,
                                  const void* bias, void* y, void* residual_out, int64_t dtype, int64_t rows,
                                  int64_t in, int64_t out, int64_t swiglu, float eps, int64_t depth, int64_t unused,
                                  int64_t early, int64_t beyond, int64_t cluster, int64_t trace, const void* after, int64_t after_bytes,
                                  cudaStream_t stream) {
  using namespace ember::skinny;
  const ember::DeviceInfo& device = ember::device_info();
  Chain chain = {};
  chain.count = 1;
  chain.after = (const char*)after, chain.after_bytes = after_bytes;
  Problem& p = chain.problems[0];
  p = {x, residual, norm_weight, weight, bias, y, residual_out, (int)rows, (int)in, (int)out};
  p.swiglu = (int)swiglu;
  p.eps = eps;
  p.early = (int)early, p.beyond = (int)beyond, p.trace = (unsigned long long*)trace;
  cut(p, cluster && device.major >= 9, device.multiprocessors);
  const int shares = device.multiprocessors / p.cluster;
  const int grid = std::min(shares, (int)out) * p.cluster;
  return choose(dtype, chain, (int)depth, grid, stream);
}

EMBER_API int ember_skinny_layer(const void* attended, const void* residual, const void* o_weight, const void* norm_weight,
                                 const void* gate_up_weight, const void* down_weight, const void* next_norm_weight,
                                 const void* next_weight, void* projected, void* middle, void* act, void* mlp,
                                 void* residual_out, void* y, int64_t dtype, int64_t rows, int64_t attended_width,
                                 int64_t hidden, int64_t ffn, int64_t next_out, float eps, int64_t depth, int64_t early,
                                 int64_t beyond, int64_t trace, const void* after, int64_t after_bytes,
                                 cudaStream_t stream) {
  using namespace ember::skinny;
  const ember::DeviceInfo& device = ember::device_info();
  Chain chain = {};
  chain.count = 4;
  chain.after = (const char*)after, chain.after_bytes = after_bytes;
  const int m = (int)rows;
  chain.problems[0] = {attended, nullptr, nullptr, o_weight, nullptr, projected, nullptr, m, (int)attended_width, (int)hidden};
  chain.problems[1] = {projected, residual, norm_weight, gate_up_weight, nullptr, act, middle, m, (int)hidden, (int)ffn};
  chain.problems[1].swiglu = 1;
  chain.problems[2] = {act, nullptr, nullptr, down_weight, nullptr, mlp, nullptr, m, (int)ffn, (int)hidden};
  chain.problems[3] = {mlp, middle, next_norm_weight, next_weight, nullptr, y, residual_out, m, (int)hidden, (int)next_out};
  for (int i = 0; i < chain.count; ++i) {
    Problem& p = chain.problems[i];
    p.eps = eps;
    p.early = (int)early, p.beyond = (int)beyond;
    if (trace) p.trace = (unsigned long long*)trace + i * 132 * 8;
    cut(p, false, device.multiprocessors);
  }
  return choose(dtype, chain, (int)depth, device.multiprocessors, stream);
}
