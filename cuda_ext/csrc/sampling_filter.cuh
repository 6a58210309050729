// Rows with min-p, top-k or top-p: exact thresholds, ties at an edge kept, the vocabulary never sorted.
//
// The largest logits of the groups (sampling.cuh) give a bound that at least k logits reach. Usually only a few hundred
// do: they are gathered from the groups that hold them and compared with each other, all with all. Where they are too
// many (a flat distribution, thousands of ties, a very large k), the thresholds are selected digit by digit over the
// line. Masses are integers, so neither way depends on the order in which threads come.
#pragma once

#include "sampling_select.cuh"

namespace ember::sampling {

constexpr int kListed = 1024;
constexpr int kProbe = 256;  // logits to gather for top-p alone
constexpr int kAhead = 4;    // pieces that a thread has on their way

// A row with filters. floor: min-p's, as a logit.
struct Row {
  int index;
  float factor, floor;
  double draw;
  Wish wish;
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
  Row row;
  int num_groups, num_listed;
  float threshold;
};

// The least integer of at least share * total, from 1 to total.
__device__ __forceinline__ u64 part_of(double share, u64 total) {
  const double part = ceil(share * (double)total);
  return min(max((u64)(part > 0. ? part : 0.), (u64)1), total);
}

__device__ __forceinline__ float lowest_tied(const Row& row, float x) {
  return lowest_with_quotient(__fdiv_rn(x, row.wish.temperature), row.wish.temperature, x);
}

// Calls f(logit) for all logits in chunks whose largest is at least `lowest`.
template <class Line, class F>
__device__ __forceinline__ void visit_line(const Args& a, const Line& line, int row, float lowest, const F& f) {
  constexpr int kStride = kThreads * Line::kSize;
  const float4* parts = a.partials + (int64_t)row * a.chunks;
  const int end = a.chunks * kChunk;
  for (int start = threadIdx.x * Line::kSize; start < end; start += kStride * kAhead) {
    Piece<typename Line::scalar> pieces[kAhead];
    bool wanted[kAhead];
#pragma unroll
    for (int v = 0; v < kAhead; ++v) {
      const int place = start + v * kStride;
      wanted[v] = place < end && parts[place / kChunk].x >= lowest;
      if (wanted[v]) pieces[v] = line.piece(place);
    }
#pragma unroll
    for (int v = 0; v < kAhead; ++v) {
      if (!wanted[v]) continue;
#pragma unroll
      for (int i = 0; i < Line::kSize; ++i) f(pieces[v][i]);
    }
  }
}

// Gathers the logits of at least `lowest`; false where they are more than the list holds.
template <class Line>
__device__ __forceinline__ bool gather(const Args& a, const Line& line, float lowest, Shared& shared) {
  const Row& row = shared.row;
  const int num_groups = a.chunks * 32;
  const float* group_max = a.group_max + (int64_t)row.index * num_groups;
  if (threadIdx.x == 0) shared.num_groups = shared.num_listed = 0;
  __syncthreads();
  for (int group = threadIdx.x; group < num_groups; group += kThreads) {
    if (group_max[group] >= lowest) {
      const int place = atomicAdd(&shared.num_groups, 1);
      if (place < kListed) shared.groups[place] = group;
    }
  }
  __syncthreads();
  const int found = shared.num_groups;
  if (found > kListed) return false;
  for (int i = threadIdx.x; i < found * Line::kPerLane; i += kThreads) {
    const int group = shared.groups[i / Line::kPerLane];
    const int start = group / 32 * kChunk + (i % Line::kPerLane * 32 + group % 32) * Line::kSize;
    const auto piece = line.piece(start);
#pragma unroll
    for (int j = 0; j < Line::kSize; ++j) {
      const float x = piece[j];
      if (x < lowest || start + j >= a.vocab) continue;
      const int place = atomicAdd(&shared.num_listed, 1);
      if (place >= kListed) continue;
      shared.list.x[place] = x;
      shared.list.scaled[place] = __fdiv_rn(x, row.wish.temperature);
      shared.list.token[place] = start + j;
      shared.list.mass[place] = mass_of(x, row.sums.largest, row.factor);
    }
  }
  __syncthreads();
  return shared.num_listed <= kListed;
}

// Draws from the list, which holds all logits of at least `lowest`; false where that is not enough for top-p.
__device__ __forceinline__ bool draw_from_list(const Args& a, float lowest, Shared& shared) {
  constexpr int kEach = kListed / kThreads;
  const Row& row = shared.row;
  List& list = shared.list;
  const int n = shared.num_listed;
  const bool all_listed = row.wish.top_k > 0 || lowest <= row.floor;  // all that top-p chooses from
  u64 above[kEach], sum = 0, total;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = (int)threadIdx.x + e * kThreads;
    above[e] = ~0ull;  // left out by top-k
    if (i >= n) continue;
    const float scaled = list.scaled[i];
    int larger = 0;
    u64 mass = 0;
    for (int j = 0; j < n; ++j) {
      const bool is_larger = list.scaled[j] > scaled;
      larger += is_larger;
      mass += is_larger ? list.mass[j] : 0;
    }
    if (row.wish.top_k > 0 && larger >= row.wish.top_k) continue;
    above[e] = mass;
    sum += list.mass[i];
  }
  block_scan(sum, total);
  u64 limit = ~0ull;
  if (row.wish.top_p < 1.f) {
    if (!all_listed) {
      const double all = row.sums.sum_t * kUnit;
      // the sum of floats is right to some 1e-7 of itself
      if (row.floor > -INFINITY || (double)total < row.wish.top_p * all * (1. + 1e-5)) return false;
      total = (u64)all;
    }
    limit = part_of(row.wish.top_p, total);
  } else if (!all_listed) {
    return false;
  }
  sum = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = (int)threadIdx.x + e * kThreads;
    if (i >= n) continue;
    if (above[e] >= limit) list.mass[i] = 0;
    sum += list.mass[i];
  }
  block_scan(sum, total);  // waits for all masses, too
  const u64 target = min((u64)(row.draw * (double)total), total - 1);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const u64 mass = list.mass[i];
    if (mass == 0) continue;
    const int token = list.token[i];
    u64 before = 0;
    for (int j = 0; j < n; ++j) before += list.token[j] < token ? list.mass[j] : 0;
    if (before <= target && target < before + mass) {
      write_result(a, row.index, token, list.x[i], row.sums, (double)total / kUnit, row.wish.temperature);
    }
  }
  return true;
}

// The lowest logit that the filters keep, from the whole line.
template <class Line>
__device__ __forceinline__ float threshold_of_line(const Args& a, const Line& line, Shared& shared) {
  const Row& row = shared.row;
  float lowest = row.floor;
#pragma unroll 1
  for (int by_mass = 0; by_mass < 2; ++by_mass) {  // top-k, then top-p
    if (by_mass ? row.wish.top_p >= 1.f : row.wish.top_k == 0) continue;
    const float selected = select_from_top<typename Line::scalar>(
        shared.histogram, [&](const auto& f) { visit_line(a, line, row.index, lowest, f); },
        [&](float x) -> u64 { return x < lowest ? 0 : by_mass ? mass_of(x, row.sums.largest, row.factor) : 1; },
        [&](u64 total) { return by_mass ? part_of(row.wish.top_p, total) : (u64)row.wish.top_k; });
    // what rounds to the same quotient is kept with it
    if (threadIdx.x == 0) shared.threshold = fmaxf(lowest, lowest_tied(row, selected));
    __syncthreads();
    lowest = shared.threshold;
    __syncthreads();
  }
  return lowest;
}

// Draws among all logits of at least `threshold`.
template <class Line>
__device__ __forceinline__ void draw_from_line(const Args& a, const Line& line, float threshold, Shared& shared) {
  const Row& row = shared.row;
  const float4* parts = a.partials + (int64_t)row.index * a.chunks;
  const int lane = threadIdx.x % 32;
  for (int chunk = threadIdx.x / 32; chunk < a.chunks; chunk += kThreads / 32) {
    u64 sum = 0;
    if (parts[chunk].x >= threshold) {
#pragma unroll kAhead
      for (int v = 0; v < Line::kPerLane; ++v) {
        const auto piece = line.piece(chunk * kChunk + (v * 32 + lane) * Line::kSize);
#pragma unroll
        for (int i = 0; i < Line::kSize; ++i) {
          sum += piece[i] >= threshold ? mass_of(piece[i], row.sums.largest, row.factor) : 0;
        }
      }
#pragma unroll
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    }
    if (lane == 0) shared.chunk_mass[chunk] = sum;
  }
  __syncthreads();
  u64 total = 0;
  const Place<u64> place = find_chunk<u64>(
      a.chunks, [&](int chunk) { return shared.chunk_mass[chunk]; },
      [&](u64 all) {
        total = all;
        return min((u64)(row.draw * (double)all), all - 1);
      });
  draw_in_chunk(
      line, place.chunk, row.sums.largest, row.factor, threshold, place.target - place.before, [&](int token, float x) {
        write_result(a, row.index, token, x, row.sums, (double)total / kUnit, row.wish.temperature);
      });
}

// Called by the whole block; `given` lacks the floor.
template <class Line>
__device__ __forceinline__ void draw_filtered(const Args& a, const Line& line, const Row& given, Shared& shared) {
  if (threadIdx.x == 0) {
    Row row = given;
    const float floor = __fdiv_rn(row.sums.largest, row.wish.temperature) + logf(fminf(row.wish.min_p, 1.f));
    row.floor = lowest_with_quotient(floor, row.wish.temperature, floor * row.wish.temperature);
    shared.row = row;
  }
  __syncthreads();
  const Row& row = shared.row;
  float lowest = row.floor;
  const int num_groups = a.chunks * 32, wanted = row.wish.top_k ? row.wish.top_k : kProbe;
  if ((row.wish.top_k || row.wish.top_p < 1.f) && wanted <= num_groups) {
    const float* group_max = a.group_max + (int64_t)row.index * num_groups;
    const float bound = select_from_top<typename Line::scalar>(
        shared.histogram,
        [&](const auto& f) {
          for (int i = threadIdx.x; i < num_groups; i += kThreads) f(group_max[i]);
        },
        [](float) -> u64 { return 1; }, [&](u64) -> u64 { return wanted; });
    if (threadIdx.x == 0) shared.threshold = lowest_tied(row, bound);
    __syncthreads();
    lowest = fmaxf(row.floor, shared.threshold);
  }
  if (lowest > -INFINITY && gather(a, line, lowest, shared) && draw_from_list(a, lowest, shared)) return;
  __syncthreads();
  draw_from_line(a, line, threshold_of_line(a, line, shared), shared);
}

}  // namespace ember::sampling
