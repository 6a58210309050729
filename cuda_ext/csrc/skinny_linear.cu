// y = x W^T for few rows: how the work is cut, and the entry point.
#include <algorithm>

#include "skinny_linear.cuh"

namespace ember::skinny {

template <class T, int kHalves, int kDepth>
int run(const Problem& p, int grid, cudaStream_t stream) {
  return launch(skinny_linear_kernel<T, kHalves, kDepth>, dim3(grid), dim3(kThreads),
                Layout<T, kHalves, kDepth>::kBytes, stream, p);
}

// The deepest ring that the GPU has shared memory for.
template <class T>
int choose(const Problem& p, int grid, cudaStream_t stream) {
  const DeviceInfo& device = device_info();
  if (p.rows > 8) {
    const bool deep = device.major >= 9 && device.shared_bytes >= Layout<T, 2, 5>::kBytes;
    return deep ? run<T, 2, 5>(p, grid, stream) : run<T, 2, 1>(p, grid, stream);
  }
  const bool deep = device.major >= 9 && device.shared_bytes >= Layout<T, 1, 6>::kBytes;
  return deep ? run<T, 1, 6>(p, grid, stream) : run<T, 1, kSmallDepth>(p, grid, stream);
}

// Cuts the weight's width into segments whose x a CTA can hold, and its rows into a share for each CTA.
void cut(Problem& p, int multiprocessors) {
  const int units = (p.in + kUnit - 1) / kUnit;
  const int least = (units + kSegmentUnits - 1) / kSegmentUnits;
  p.segment_units = (units + least - 1) / least;
  p.segments = (units + p.segment_units - 1) / p.segment_units;
  p.steps = (p.segment_units + kWarps - 1) / kWarps;
  p.share_rows = p.out / multiprocessors;
  p.longer_shares = p.out % multiprocessors;
  const int longest = p.share_rows + (p.longer_shares ? 1 : 0);
  const int full = p.swiglu ? kTileRows / 2 : kTileRows;
  const int tiles = (longest + full - 1) / full;
  p.tile_rows = (longest + tiles - 1) / tiles;
  p.block_rows = p.segments == 1 ? p.out : kBlockTiles * p.tile_rows;
}

}  // namespace ember::skinny

// x [rows, in], weight [out, in] ([2 out, in] with SwiGLU), y [rows, out]; with a norm_weight x (+ residual) is
// normalized first, and residual_out, where it is given, takes the sum.
EMBER_API int ember_skinny_linear(const void* x, const void* residual, const void* norm_weight, const void* weight,
                                  const void* bias, void* y, void* residual_out, int64_t dtype, int64_t rows,
                                  int64_t in, int64_t out, int64_t swiglu, float eps, cudaStream_t stream) {
  using namespace ember::skinny;
  const int multiprocessors = ember::device_info().multiprocessors;
  Problem p = {x, residual, norm_weight, weight, bias, y, residual_out, (int)rows, (int)in, (int)out, (int)swiglu, eps};
  cut(p, multiprocessors);
  const int grid = std::min(multiprocessors, (int)out);
  if (dtype == ember::kBFloat16) return choose<ember::bf16>(p, grid, stream);
  if (dtype == ember::kFloat16) return choose<ember::fp16>(p, grid, stream);
  return ember::fail("skinny_linear takes bfloat16 and float16, not number format %lld", (long long)dtype);
}
