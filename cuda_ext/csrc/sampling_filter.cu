// Rows with min-p, top-k or top-p: exact thresholds, ties at an edge kept, the vocabulary never sorted.
//
// The largest logits of the groups (sampling.cuh) give a bound that at least k logits reach. Usually only a few hundred
// do: they are gathered from the groups that hold them and compared with each other, all with all. Where they are too
// many (a flat distribution, thousands of ties, a very large k), the thresholds are selected digit by digit over the
// row. Masses are integers, so neither way depends on the order in which threads come.
#include "sampling_filter.cuh"

namespace ember::sampling {

constexpr int kListed = 1024;
constexpr int kProbe = 256;  // logits to gather for top-p alone

// What is to be known of a row before its threshold.
struct Row {
  int index, top_k;
  float temperature, top_p, factor, floor;  // floor: min-p's, as a logit
  double draw;
  RowSums sums;
};

struct List {
  float x[kListed], scaled[kListed];
  int token[kListed];
  u64 mass[kListed];
};

struct Shared {
  union {
    Histogram histogram;
    int groups[kListed];
    u64 chunk_mass[kMaxChunks];
  };
  List list;
  Row row;  // here, for the sake of registers
  int num_groups, num_listed, chosen;
  u64 chosen_before;
  float threshold;
};

template <class scalar>
__device__ __forceinline__ constexpr int passes() {
  return sizeof(scalar) == 2 ? 2 : 3;
}

__device__ __forceinline__ u64 part_of(double share, u64 total) {
  const double part = ceil(share * (double)total);
  return min(max((u64)(part > 0. ? part : 0.), (u64)1), total);
}

// Calls f(logit) for all logits in chunks whose largest is at least `lowest`.
template <class scalar, class F>
__device__ __forceinline__ void visit_row(const Args& a, const scalar* line, int row, float lowest, F f) {
  constexpr int kSize = Piece<scalar>::kSize;
  const float4* parts = a.partials + (int64_t)row * a.chunks;
  for (int start = threadIdx.x * kSize; start < a.chunks * kChunk; start += kFilterThreads * kSize) {
    if (parts[start / kChunk].x < lowest) continue;
    Piece<scalar> piece;
    piece.load(line, start, a.vocab, a.aligned);
#pragma unroll
    for (int i = 0; i < kSize; ++i) f(piece[i]);
  }
}

// Gathers the logits of at least `lowest`; false where they are more than the list holds.
template <class scalar>
__device__ bool gather(const Args& a, const scalar* line, float lowest, Shared& shared) {
  const Row& row = shared.row;
  constexpr int kSize = Piece<scalar>::kSize, kPieces = Piece<scalar>::kPerLane;
  const int num_groups = a.chunks * 32;
  const float* group_max = a.group_max + (int64_t)row.index * num_groups;
  if (threadIdx.x == 0) shared.num_groups = shared.num_listed = 0;
  __syncthreads();
  for (int group = threadIdx.x; group < num_groups; group += kFilterThreads) {
    if (group_max[group] >= lowest) {
      const int place = atomicAdd(&shared.num_groups, 1);
      if (place < kListed) shared.groups[place] = group;
    }
  }
  __syncthreads();
  const int found = shared.num_groups;
  if (found > kListed) return false;
  for (int i = threadIdx.x; i < found * kPieces; i += kFilterThreads) {
    const int group = shared.groups[i / kPieces];
    const int start = group / 32 * kChunk + (i % kPieces * 32 + group % 32) * kSize;
    Piece<scalar> piece;
    piece.load(line, start, a.vocab, a.aligned);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float x = piece[j];
      if (x >= lowest && start + j < a.vocab) {
        const int place = atomicAdd(&shared.num_listed, 1);
        if (place < kListed) {
          shared.list.x[place] = x;
          shared.list.scaled[place] = __fdiv_rn(x, row.temperature);
          shared.list.token[place] = start + j;
          shared.list.mass[place] = mass_of(x, row.sums.largest, row.factor);
        }
      }
    }
  }
  __syncthreads();
  return shared.num_listed <= kListed;
}

// Draws from the list, which holds all logits of at least `lowest`; false where that is not enough for top-p.
__device__ bool draw_from_list(const Args& a, float lowest, Shared& shared) {
  const Row& row = shared.row;
  constexpr int kEach = kListed / kFilterThreads;
  List& list = shared.list;
  const int n = shared.num_listed;
  u64 above[kEach], listed = 0, sum = 0;
  bool kept[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = (int)threadIdx.x + e * kFilterThreads;
    above[e] = 0, kept[e] = false;
    if (i >= n) continue;
    const float scaled = list.scaled[i];
    int larger = 0;
    for (int j = 0; j < n; ++j) {
      const bool is_larger = list.scaled[j] > scaled;
      larger += is_larger;
      above[e] += is_larger ? list.mass[j] : 0;
    }
    kept[e] = row.top_k == 0 || larger < row.top_k;
    listed += kept[e] ? list.mass[i] : 0;
  }
  u64 through, total;
  scan<kFilterThreads>(listed, through, total);
  if (row.top_p < 1.f) {
    if (row.top_k == 0 && lowest > row.floor) {  // there is more than is listed
      const double all = row.sums.sum_t * kUnit;
      // the sum of floats is right to some 1e-7 of itself
      if (row.floor > -INFINITY || (double)total < row.top_p * all * (1. + 1e-5)) return false;
      total = (u64)all;
    }
    const u64 target = part_of(row.top_p, total);
#pragma unroll
    for (int e = 0; e < kEach; ++e) kept[e] = kept[e] && above[e] < target;
  } else if (row.top_k == 0 && lowest > row.floor) {
    return false;
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = (int)threadIdx.x + e * kFilterThreads;
    if (i >= n) continue;
    if (!kept[e]) list.mass[i] = 0;
    sum += list.mass[i];
  }
  scan<kFilterThreads>(sum, through, total);  // waits for all masses, too
  const u64 target = min((u64)(row.draw * (double)total), total - 1);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = (int)threadIdx.x + e * kFilterThreads;
    if (i >= n || list.mass[i] == 0) continue;
    const int token = list.token[i];
    u64 before = 0;
    for (int j = 0; j < n; ++j) before += list.token[j] < token ? list.mass[j] : 0;
    if (before <= target && target < before + list.mass[i]) {
      write_result(a, row.index, token, list.x[i], row.sums, (double)total / kUnit, false);
    }
  }
  return true;
}

// The lowest logit that the filters keep, from the whole row.
template <class scalar>
__device__ float threshold_of_row(const Args& a, const scalar* line, Shared& shared) {
  const Row& row = shared.row;
  float lowest = row.floor;
  const auto settle = [&](float selected) {  // what rounds to the same quotient is kept with it
    if (threadIdx.x == 0) {
      const float tied = lowest_with_quotient(__fdiv_rn(selected, row.temperature), row.temperature, selected);
      shared.threshold = fmaxf(lowest, tied);
    }
    __syncthreads();
    lowest = shared.threshold;
    __syncthreads();
  };
  if (row.top_k > 0) {
    settle(select_from_top<passes<scalar>()>(
        shared.histogram, [&](auto f) { visit_row(a, line, row.index, lowest, f); },
        [&](float x) -> u64 { return x >= lowest; }, [&](u64) -> u64 { return row.top_k; }));
  }
  if (row.top_p < 1.f) {
    settle(select_from_top<passes<scalar>()>(
        shared.histogram, [&](auto f) { visit_row(a, line, row.index, lowest, f); },
        [&](float x) -> u64 { return x >= lowest ? mass_of(x, row.sums.largest, row.factor) : 0; },
        [&](u64 total) -> u64 { return part_of(row.top_p, total); }));
  }
  return lowest;
}

// Draws among all logits of at least `threshold`.
template <class scalar>
__device__ void draw_from_row(const Args& a, const scalar* line, float threshold, Shared& shared) {
  const Row& row = shared.row;
  constexpr int kSize = Piece<scalar>::kSize;
  const float4* parts = a.partials + (int64_t)row.index * a.chunks;
  const int lane = threadIdx.x % 32;
  for (int chunk = threadIdx.x / 32; chunk < kMaxChunks; chunk += kFilterThreads / 32) {
    u64 sum = 0;
    if (chunk < a.chunks && parts[chunk].x >= threshold) {
      for (int v = 0; v < Piece<scalar>::kPerLane; ++v) {
        Piece<scalar> piece;
        piece.load(line, chunk * kChunk + (v * 32 + lane) * kSize, a.vocab, a.aligned);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum += piece[i] >= threshold ? mass_of(piece[i], row.sums.largest, row.factor) : 0;
        }
      }
#pragma unroll
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    }
    if (lane == 0) shared.chunk_mass[chunk] = sum;
  }
  __syncthreads();
  static_assert(kMaxChunks <= kFilterThreads, "a thread a chunk");
  const u64 mine = threadIdx.x < kMaxChunks ? shared.chunk_mass[threadIdx.x] : 0;
  u64 through, total;
  const u64 before = scan<kFilterThreads>(mine, through, total);
  const u64 target = min((u64)(row.draw * (double)total), total - 1);
  if (before <= target && target < through) shared.chosen = threadIdx.x, shared.chosen_before = before;
  __syncthreads();
  draw_in_chunk<kFilterThreads>(
      a, line, shared.chosen, row.sums.largest, row.factor, threshold, target - shared.chosen_before,
      [&](int token, float x) { write_result(a, row.index, token, x, row.sums, (double)total / kUnit, false); });
}

template <class scalar>
__global__ void __launch_bounds__(kFilterThreads) filter_kernel(const Args a) {
  __shared__ Shared shared;
  let_successor_start();
  wait_for_predecessor();
  const int index = blockIdx.x;
  if (a.slot[index] < 0 || !has_filters(a, index)) return;
  const float temperature = a.temperature[index], factor = exponent_factor(temperature);
  const bool has_part = (int)threadIdx.x < a.chunks;
  const float4 part =
      has_part ? a.partials[(int64_t)index * a.chunks + threadIdx.x] : float4{kLowest, 0.f, 0.f, 0.f};
  RowSums sums;
  sums.largest = block_max<kFilterThreads>(part.x);
  const float below = part.x - sums.largest;
  double through;
  scan<kFilterThreads>((double)part.y * exp2_fast(below * kLog2E), through, sums.sum_1);
  scan<kFilterThreads>((double)part.z * exp2_fast(below * factor), through, sums.sum_t);
  if (!sums.usable()) {
    if (threadIdx.x == 0) write_unusable(a, index);
    return;
  }
  if (threadIdx.x == 0) {
    const float scaled = __fdiv_rn(sums.largest, temperature) + logf(fminf(a.min_p[index], 1.f));
    Row row;
    row.index = index;
    row.top_k = a.top_k[index] >= a.vocab ? 0 : max(a.top_k[index], 0);
    row.temperature = temperature;
    row.top_p = a.top_p[index];
    row.factor = factor;
    row.floor = lowest_with_quotient(scaled, temperature, scaled * temperature);
    row.draw = uniform(a, index);
    row.sums = sums;
    shared.row = row;
  }
  __syncthreads();
  const Row& row = shared.row;
  const scalar* line = line_of<scalar>(a, index);
  float lowest = row.floor;
  const int num_groups = a.chunks * 32, wanted = row.top_k ? row.top_k : kProbe;
  if ((row.top_k || row.top_p < 1.f) && wanted <= num_groups) {
    const float* group_max = a.group_max + (int64_t)index * num_groups;
    const float bound = select_from_top<passes<scalar>()>(
        shared.histogram,
        [&](auto f) {
          for (int i = threadIdx.x; i < num_groups; i += kFilterThreads) f(group_max[i]);
        },
        [](float) -> u64 { return 1; }, [&](u64) -> u64 { return wanted; });
    if (threadIdx.x == 0) {
      shared.threshold = lowest_with_quotient(__fdiv_rn(bound, row.temperature), row.temperature, bound);
    }
    __syncthreads();
    lowest = fmaxf(row.floor, shared.threshold);
  }
  if (lowest > -INFINITY && gather(a, line, lowest, shared) && draw_from_list(a, lowest, shared)) return;
  __syncthreads();
  draw_from_row(a, line, threshold_of_row(a, line, shared), shared);
}

int filter(const Args& args, int64_t dtype, cudaStream_t stream) {
  EMBER_DISPATCH(dtype, {
    return ember::launch(filter_kernel<scalar>, dim3((unsigned)args.rows), kFilterThreads, 0, stream, args);
  });
  return 0;
}

}  // namespace ember::sampling
