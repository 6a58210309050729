// Sampling from logits: one streaming read, then a block a row finds the chunk and the token that the draw falls on.
// Rows with filters go through sampling_filter.cuh. The reference is sample_rows_reference in cuda_ext/decode_state.py.
#include "sampling_filter.cuh"

namespace ember::sampling {

constexpr int kPartialWarps = 4;

__device__ __forceinline__ float piece_max(const Piece<float>& piece) {
  return fmaxf(fmaxf(piece[0], piece[1]), fmaxf(piece[2], piece[3]));
}
__device__ __forceinline__ float piece_max(const Piece<bf16>& piece) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(piece.words);
  const __nv_bfloat162 most = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
  return fmaxf(__low2float(most), __high2float(most));
}
__device__ __forceinline__ float piece_max(const Piece<fp16>& piece) {
  const auto* pairs = reinterpret_cast<const __half2*>(piece.words);
  const __half2 most = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
  return fmaxf(__low2float(most), __high2float(most));
}

// Sum over the warp of exp2((x - largest) * factor), in a fixed order.
template <int kPieces, class scalar>
__device__ __forceinline__ float chunk_sum(const Piece<scalar>* pieces, float largest, float factor) {
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int v = 0; v < kPieces; ++v) {
#pragma unroll
    for (int i = 0; i < Piece<scalar>::kSize; ++i) sums[i % 2] += exp2_fast((pieces[v][i] - largest) * factor);
  }
  float sum = sums[0] + sums[1];
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// A warp a chunk: its maximum and its sums of exponentials at temperature 1 and at the row's temperature.
template <class Line>
__global__ void __launch_bounds__(32 * kPartialWarps) partials_kernel(const Args a) {
  constexpr int kPieces = Line::kPerLane;
  let_successor_start();
  wait_for_predecessor();
  const int lane = threadIdx.x % 32;
  const int job = blockIdx.x * kPartialWarps + (int)threadIdx.x / 32;
  const int row = job / a.chunks, chunk = job % a.chunks;
  if (row >= a.rows) return;
  const Wish wish(a, row);
  if (wish.slot < 0) return;

  const Line line(a, row);
  Piece<typename Line::scalar> pieces[kPieces];
#pragma unroll
  for (int v = 0; v < kPieces; ++v) pieces[v] = line.piece(chunk * kChunk + (v * 32 + lane) * Line::kSize);
  float largest = kLowest;  // of NaN and a number, fmaxf takes the number; the sum tells of the NaN
#pragma unroll
  for (int v = 0; v < kPieces; ++v) largest = fmaxf(largest, piece_max(pieces[v]));
  if (wish.filtered) a.group_max[((int64_t)row * a.chunks + chunk) * 32 + lane] = largest;
#pragma unroll
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));

  const float sum_1 = chunk_sum<kPieces>(pieces, largest, kLog2E);
  float sum_t = sum_1;
  if (wish.temperature != 1.f && wish.temperature != 0.f) {
#pragma unroll
    for (int v = 0; v < kPieces; ++v) pieces[v].forget_unpacked();
    sum_t = chunk_sum<kPieces>(pieces, largest, exponent_factor(wish.temperature));
  }
  if (lane == 0) a.partials[(int64_t)row * a.chunks + chunk] = make_float4(largest, sum_1, sum_t, 0.f);
}

// A row without filters: finds the chunk, then the token. Greedy is the draw of the first token among the largest.
template <class Line>
__device__ __forceinline__ void draw_plain(
    const Args& a, int row, const float4* parts, const RowSums& sums, float temperature, float factor, double draw) {
  const bool greedy = temperature == 0.f;
  const auto weight = [&](int chunk) -> double {
    const float4 part = parts[chunk];
    if (greedy) return part.x == sums.largest;
    return (double)part.z * exp2_fast((part.x - sums.largest) * factor);
  };
  // u * total may round up to total itself, which no token reaches
  const auto target_of = [&](double total) { return greedy ? 0. : fmin(draw * total, total * (1. - 0x1p-53)); };
  const Place<double> place = find_chunk<double>(a.chunks, weight, target_of);
  const float largest = parts[place.chunk].x;
  const double scale = exp2_fast((largest - sums.largest) * factor);
  const u64 target = greedy ? 0 : (u64)((place.target - place.before) / scale * kUnit);
  draw_in_chunk(
      Line(a, row), place.chunk, largest, factor, greedy ? largest : -INFINITY, target,
      [&](int token, float x) { write_result(a, row, token, x, sums, sums.sum_t, temperature); });
}

// A block a row.
template <class Line>
__global__ void __launch_bounds__(kThreads) draw_kernel(const Args a) {
  __shared__ Shared shared;
  let_successor_start();
  wait_for_predecessor();
  const int row = blockIdx.x;
  const Wish wish(a, row);
  if (wish.slot < 0) {
    if (threadIdx.x == 0) a.tokens[row] = 0, a.logprobs[row] = 0.f, a.sampling_logprobs[row] = 0.f;
    return;
  }
  const float factor = exponent_factor(wish.temperature);
  const float4* parts = a.partials + (int64_t)row * a.chunks;
  const RowSums sums(parts, a.chunks, factor);
  const double draw = uniform(a, row, a.num_tokens[wish.slot]);
  if (!sums.usable()) {
    if (threadIdx.x == 0) {
      a.tokens[row] = 0;
      a.logprobs[row] = NAN;
      a.sampling_logprobs[row] = wish.temperature == 0.f ? 0.f : NAN;
    }
  } else if (wish.filtered) {
    draw_filtered(a, Line(a, row), {row, factor, 0.f, draw, wish, sums}, shared);
  } else {
    draw_plain<Line>(a, row, parts, sums, wish.temperature, factor, draw);
  }
}

template <class Line>
int launch_both(const Args& args, cudaStream_t stream) {
  const dim3 partial_blocks((unsigned)(((int64_t)args.rows * args.chunks + kPartialWarps - 1) / kPartialWarps));
  const int status = ember::launch(partials_kernel<Line>, partial_blocks, 32 * kPartialWarps, 0, stream, args);
  return status ? status : ember::launch(draw_kernel<Line>, dim3((unsigned)args.rows), kThreads, 0, stream, args);
}

}  // namespace ember::sampling

// workspace: [rows, chunks of 2048] float4, then [rows, chunks, 32] float32.
EMBER_API int ember_sample_rows(
    const void* logits, const int* logits_rows, const int* slot, const int* num_tokens, const float* temperature,
    const int* top_k, const float* top_p, const float* min_p, const int64_t* seed, const int64_t* prompt_hash,
    const int* candidate, int* tokens, float* logprobs, float* sampling_logprobs, float* workspace, int64_t rows,
    int64_t vocab, int64_t dtype, cudaStream_t stream) {
  using namespace ember::sampling;
  if (rows == 0) return 0;
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  if (chunks > kMaxChunks) {
    return ember::fail("a vocabulary of %lld is more than the %d that sampling was written for", (long long)vocab,
                       kMaxChunks * kChunk);
  }
  Args args = {};
  args.logits = logits, args.logits_rows = logits_rows;
  args.slot = slot, args.num_tokens = num_tokens, args.top_k = top_k, args.candidate = candidate;
  args.temperature = temperature, args.top_p = top_p, args.min_p = min_p;
  args.seed = seed, args.prompt_hash = prompt_hash;
  args.tokens = tokens, args.logprobs = logprobs, args.sampling_logprobs = sampling_logprobs;
  args.partials = reinterpret_cast<float4*>(workspace);
  args.group_max = workspace + rows * chunks * 4;
  args.rows = (int)rows, args.vocab = (int)vocab, args.chunks = (int)chunks;
  const int64_t line_bytes = vocab * (dtype == ember::kFloat32 ? 4 : 2);
  const bool aligned = line_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  EMBER_DISPATCH(dtype, {
    return aligned ? launch_both<Line<scalar, true>>(args, stream) : launch_both<Line<scalar, false>>(args, stream);
  });
  return 0;
}
