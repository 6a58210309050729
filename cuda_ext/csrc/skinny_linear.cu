// y = x W^T for few rows: how the work is cut, and the entry points.
#include <algorithm>

#include "skinny_linear.cuh"

namespace ember::skinny {

template <class T, int kHalves, int kDepth>
int run(const Chain& chain, int grid, cudaStream_t stream) {
  return launch(skinny_linear_kernel<T, kHalves, kDepth>, dim3(grid), dim3(kThreads),
                Layout<T, kHalves, kDepth>::kBytes, stream, chain);
}

template <class T>
int choose(const Chain& chain, int depth, int grid, cudaStream_t stream) {
  if (chain.problems[0].rows > 8) return run<T, 2, 3>(chain, grid, stream);
  return depth == 4 ? run<T, 1, 4>(chain, grid, stream) : run<T, 1, 6>(chain, grid, stream);
}

int choose(int64_t dtype, const Chain& chain, int depth, int grid, cudaStream_t stream) {
  if (dtype == kBFloat16) return choose<bf16>(chain, depth, grid, stream);
  if (dtype == kFloat16) return choose<fp16>(chain, depth, grid, stream);
  return fail("skinny_linear takes bfloat16 and float16, not number format %lld", (long long)dtype);
}

// Cuts the weight's width into segments whose x a CTA can hold, and its rows into a share for each CTA.
void cut(Problem& p, int multiprocessors) {
  const int units = (p.in + kUnit - 1) / kUnit;
  const int least = (units + kSegmentUnits - 1) / kSegmentUnits;
  p.segment_units = (units + least - 1) / least;
  p.segments = (units + p.segment_units - 1) / p.segment_units;
  p.share_rows = p.out / multiprocessors;
  p.longer_shares = p.out % multiprocessors;
  const int longest = p.share_rows + (p.longer_shares ? 1 : 0);
  const int full = p.swiglu ? kTileRows / 2 : kTileRows;
  const int tiles = (longest + full - 1) / full;
  p.tile_rows = (longest + tiles - 1) / tiles;
}

}  // namespace ember::skinny

EMBER_API int ember_skinny_linear(const void* x, const void* residual, const void* norm_weight, const void* weight,
                                  const void* bias, void* y, void* residual_out, int64_t dtype, int64_t rows,
                                  int64_t in, int64_t out, int64_t swiglu, float eps, int64_t depth, int64_t early,
                                  int64_t trace, cudaStream_t stream) {
  using namespace ember::skinny;
  const int multiprocessors = ember::device_info().multiprocessors;
  Chain chain = {};
  chain.count = 1;
  Problem& p = chain.problems[0];
  p = {x, residual, norm_weight, weight, bias, y, residual_out, (int)rows, (int)in, (int)out};
  p.swiglu = (int)swiglu;
  p.eps = eps;
  p.early = (int)early, p.trace = (unsigned long long*)trace;
  cut(p, multiprocessors);
  return choose(dtype, chain, (int)depth, std::min(multiprocessors, (int)out), stream);
}

EMBER_API int ember_skinny_layer(const void* attended, const void* residual, const void* o_weight,
                                 const void* norm_weight, const void* gate_up_weight, const void* down_weight,
                                 const void* next_norm_weight, const void* next_weight, void* projected, void* middle,
                                 void* act, void* mlp, void* residual_out, void* y, int64_t dtype, int64_t rows,
                                 int64_t attended_width, int64_t hidden, int64_t ffn, int64_t next_out, float eps,
                                 int64_t depth, int64_t early, int64_t trace, cudaStream_t stream) {
  using namespace ember::skinny;
  const int multiprocessors = ember::device_info().multiprocessors;
  Chain chain = {};
  chain.count = 4;
  const int m = (int)rows, h = (int)hidden;
  chain.problems[0] = {attended, nullptr, nullptr, o_weight, nullptr, projected, nullptr, m, (int)attended_width, h};
  chain.problems[1] = {projected, residual, norm_weight, gate_up_weight, nullptr, act, middle, m, h, (int)ffn};
  chain.problems[1].swiglu = 1;
  chain.problems[2] = {act, nullptr, nullptr, down_weight, nullptr, mlp, nullptr, m, (int)ffn, h};
  chain.problems[3] = {mlp, middle, next_norm_weight, next_weight, nullptr, y, residual_out, m, h, (int)next_out};
  for (int i = 0; i < chain.count; ++i) {
    Problem& p = chain.problems[i];
    p.eps = eps;
    p.early = (int)early;
    if (trace) p.trace = (unsigned long long*)trace + i * 132 * 8;
    cut(p, multiprocessors);
  }
  return choose(dtype, chain, (int)depth, multiprocessors, stream);
}
