// Sampling from logits: one streaming read, then a search in one chunk a row. Rows with filters are finished by
// sampling_filter.cu. The reference is sample_rows_reference in cuda_ext/decode_state.py.
#include "sampling.cuh"

namespace ember::sampling {

constexpr int kPartialWarps = 4;
constexpr int kDrawThreads = 256;

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
template <class scalar>
__device__ __forceinline__ float chunk_sum(const Piece<scalar>* pieces, float largest, float factor) {
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int v = 0; v < Piece<scalar>::kPerLane; ++v) {
#pragma unroll
    for (int i = 0; i < Piece<scalar>::kSize; ++i) sums[i % 2] += exp2_fast((pieces[v][i] - largest) * factor);
  }
  float sum = sums[0] + sums[1];
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// A warp a chunk: its maximum and its sums of exponentials at temperature 1 and at the row's temperature.
template <class scalar, bool kAligned>
__global__ void __launch_bounds__(32 * kPartialWarps) partials_kernel(const Args a) {
  let_successor_start();
  wait_for_predecessor();
  const int lane = threadIdx.x % 32;
  const int job = blockIdx.x * kPartialWarps + threadIdx.x / 32;
  const int row = job / a.chunks, chunk = job % a.chunks;
  if (row >= a.rows || a.slot[row] < 0) return;

  const scalar* line = line_of<scalar>(a, row);
  Piece<scalar> pieces[Piece<scalar>::kPerLane];
  const int first = chunk * kChunk + lane * Piece<scalar>::kSize;
#pragma unroll
  for (int v = 0; v < Piece<scalar>::kPerLane; ++v) {
    const int start = first + v * 32 * Piece<scalar>::kSize;
    if (kAligned) {
      pieces[v].load_aligned(line, start, a.vocab);
    } else {
      pieces[v].load_anywhere(line, start, a.vocab);
    }
  }
  const float temperature = a.temperature[row];
  float largest = kLowest;  // of NaN and a number, fmaxf takes the number; the sum tells of the NaN
#pragma unroll
  for (int v = 0; v < Piece<scalar>::kPerLane; ++v) largest = fmaxf(largest, piece_max(pieces[v]));
  if (has_filters(a, row)) a.group_max[((int64_t)row * a.chunks + chunk) * 32 + lane] = largest;
#pragma unroll
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));

  const float sum_1 = chunk_sum(pieces, largest, kLog2E);
  float sum_t = sum_1;
  if (temperature != 1.f && temperature != 0.f) {
#pragma unroll
    for (int v = 0; v < Piece<scalar>::kPerLane; ++v) pieces[v].forget_unpacked();
    sum_t = chunk_sum(pieces, largest, exponent_factor(temperature));
  }
  if (lane == 0) a.partials[(int64_t)row * a.chunks + chunk] = make_float4(largest, sum_1, sum_t, 0.f);
}

// A block a row without filters: finds the chunk, then the token. Greedy takes the first of the largest.
template <class scalar>
__global__ void __launch_bounds__(kDrawThreads) draw_kernel(const Args a) {
  constexpr int kEach = kMaxChunks / kDrawThreads;
  __shared__ int chosen;
  __shared__ double chosen_before;
  let_successor_start();
  wait_for_predecessor();
  const int row = blockIdx.x;
  if (a.slot[row] < 0) {
    if (threadIdx.x == 0) a.tokens[row] = 0, a.logprobs[row] = 0.f, a.sampling_logprobs[row] = 0.f;
    return;
  }
  if (has_filters(a, row)) return;
  const bool greedy = a.temperature[row] == 0.f;
  const float factor = exponent_factor(a.temperature[row]);
  const int first = (int)threadIdx.x * kEach;

  float4 parts[kEach];
  RowSums sums = {kLowest, 0., 0.};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    parts[i] = first + i < a.chunks ? a.partials[(int64_t)row * a.chunks + first + i] : float4{kLowest, 0.f, 0.f, 0.f};
    sums.largest = fmaxf(sums.largest, parts[i].x);
  }
  sums.largest = block_max<kDrawThreads>(sums.largest);
  double mine_1 = 0., mine_t = 0., weights[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    mine_1 += (double)parts[i].y * exp2_fast((parts[i].x - sums.largest) * kLog2E);
    weights[i] = (double)parts[i].z * exp2_fast((parts[i].x - sums.largest) * factor);
    mine_t += weights[i];
  }
  double through;
  scan<kDrawThreads>(mine_1, through, sums.sum_1);
  double before = scan<kDrawThreads>(mine_t, through, sums.sum_t);
  if (!sums.usable()) {
    if (threadIdx.x == 0) write_unusable(a, row);
    return;
  }

  // u * total may round up to total itself, which no token reaches
  double target = fmin(uniform(a, row) * sums.sum_t, sums.sum_t * (1. - 0x1p-53));
  if (threadIdx.x == 0) chosen = kMaxChunks;
  __syncthreads();
  int mine = kMaxChunks;
#pragma unroll
  for (int i = kEach - 1; i >= 0; --i) {
    const double behind = i == kEach - 1 ? through : before + weights[0];
    const double ahead = i == 0 ? before : before + weights[0];
    static_assert(kEach <= 2, "the sums between are those of two chunks a thread");
    if (greedy ? parts[i].x == sums.largest : ahead <= target && target < behind) mine = first + i;
  }
  // a sum of doubles may step back by its last bit, so that two chunks claim the target: the first has it
  if (mine < kMaxChunks) atomicMin(&chosen, mine);
  __syncthreads();
  if (mine == chosen && mine < kMaxChunks) chosen_before = mine == first ? before : before + weights[0];
  __syncthreads();
  const int chunk = chosen;
  const scalar* line = line_of<scalar>(a, row);
  const float4 part = a.partials[(int64_t)row * a.chunks + chunk];
  // greedy is the draw of the first token among those that are not under the largest
  const double scale = exp2_fast((part.x - sums.largest) * factor);
  const u64 within = greedy ? 0 : (u64)((target - chosen_before) / scale * kUnit);
  draw_in_chunk<kDrawThreads>(
      a, line, chunk, part.x, factor, greedy ? part.x : -INFINITY, within,
      [&](int token, float x) { write_result(a, row, token, x, sums, sums.sum_t, greedy); });
}

int filter(const Args& args, int64_t dtype, cudaStream_t stream);  // sampling_filter.cu

}  // namespace ember::sampling

// Floats of workspace a row: a float4 a chunk, then the maxima of 32 groups a chunk.
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
  const int64_t bytes = vocab * (dtype == ember::kFloat32 ? 4 : 2);
  Args args = {};
  args.logits = logits, args.logits_rows = logits_rows;
  args.slot = slot, args.num_tokens = num_tokens, args.top_k = top_k, args.candidate = candidate;
  args.temperature = temperature, args.top_p = top_p, args.min_p = min_p;
  args.seed = seed, args.prompt_hash = prompt_hash;
  args.tokens = tokens, args.logprobs = logprobs, args.sampling_logprobs = sampling_logprobs;
  args.partials = reinterpret_cast<float4*>(workspace);
  args.group_max = workspace + rows * chunks * 4;
  args.rows = (int)rows, args.vocab = (int)vocab, args.chunks = (int)chunks;
  args.aligned = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const dim3 partial_blocks((unsigned)((rows * chunks + kPartialWarps - 1) / kPartialWarps));
  EMBER_DISPATCH(dtype, {
    const auto partials = args.aligned ? partials_kernel<scalar, true> : partials_kernel<scalar, false>;
    int status = ember::launch(partials, partial_blocks, 32 * kPartialWarps, 0, stream, args);
    if (status == 0) status = ember::launch(draw_kernel<scalar>, dim3((unsigned)rows), kDrawThreads, 0, stream, args);
    if (status) return status;
  });
  return filter(args, dtype, stream);
}
